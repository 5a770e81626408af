from balance.comparison.recorded_run import RecordedRun
from balance.comparison.run_table import tabulate
from experiments.analysis import published_comparison, published_tables
from tests.comparison.pages import plain, report


def of_nyuv2(**settings):
    """Runs with the metrics of the published single-task networks, and the published table next to them."""
    table = published_tables.load("nyuv2")
    values = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    runs = [RecordedRun("id", "famo", None, 0, settings, values)]
    compared = tabulate(runs, experiment="nyuv2", higher_is_better=table.higher_is_better, baselines=values)
    return compared, [published_comparison.compare_with_published(table, compared)]


def test_published_results_have_a_section_of_their_own():
    compared, tables = of_nyuv2(**{"data.source": "files", "data.protocol": "sound"})
    text, page = report(compared, sections=[published_comparison.section(table) for table in tables])
    made = published_comparison.text_table(tables[0])
    head, *body = page.rows[3 : 3 + 1 + len(made.lines)]  # behind the header, the method and the single-task networks
    assert [plain(text) for _, text in head] == made.header
    assert [[plain(text) for _, text in line] for line in body] == [[cell.text for cell in line] for line in made.lines]
    assert {kind for line in body for kind, _ in line} == {None}  # nothing is best, alike or worse
    classes = [attrs.get("class") for tag, attrs in page.tags if tag == "tr"][4 : 4 + len(made.lines)]
    assert classes.count("here") == 1
    assert classes[-2:] == ["single-task", "single-task"]
    for words in (tables[0].title, made.legend, *published_comparison.notes(tables[0]), tables[0].relation):
        assert words in page
    assert 'class="relation"' in text
    assert 'class="warning"' not in text


def test_published_results_beside_runs_on_other_data_come_with_a_warning():
    compared, tables = of_nyuv2(**{"data.source": "scenes"})
    text, page = report(compared, sections=[published_comparison.section(table) for table in tables])
    assert f'<p class="warning">{tables[0].relation}</p>' in text
    assert "Not comparable with the runs here" in page
    assert "here" not in [attrs.get("class") for tag, attrs in page.tags if tag == "tr"]
    text, page = report(compared)
    assert "Published" not in page
    assert 'class="warning"' not in text
