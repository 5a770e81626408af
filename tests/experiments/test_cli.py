import argparse

import pytest

from experiments.cli import MISTAKES, parse_seeds, run_command


def command(prepare, *words, **options):
    parser = argparse.ArgumentParser()
    parser.add_argument("number", type=int)
    return run_command(parser, words, prepare, **options)


def raising(error):
    def function(*_):
        raise error

    return function


def test_the_exit_code_of_a_command_is_the_code_of_its_work():
    assert command(lambda options: lambda: options.number + 1, "2") == 3


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_ends_a_command_with_its_usage_and_code_2(kind, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(raising(kind("the number is wrong")), "2")
    error = capsys.readouterr().err
    assert error.startswith("usage:")
    assert error.endswith("the number is wrong\n")


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError()])
def test_an_error_of_the_work_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        command(lambda _: raising(error), "2")


def test_ctrl_c_gives_code_130_and_a_message(capsys):
    assert command(raising(KeyboardInterrupt), "2", interrupted="The work goes on.") == 130
    assert capsys.readouterr().out == "Interrupted.\n"
    assert command(lambda _: raising(KeyboardInterrupt), "2", interrupted="The work goes on.") == 130
    assert capsys.readouterr().out == "The work goes on.\n"


@pytest.mark.parametrize(("words", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("4,7", [4, 7]), ("5,", [5]), ("0,", [0])])
def test_seeds(words, seeds):
    assert parse_seeds(words) == seeds
