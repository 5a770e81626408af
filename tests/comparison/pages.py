"""Pages of reports, read by a parser that insists on matching tags."""

from html.parser import HTMLParser

from balance.comparison.report import html

VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Content of a page, by a parser that insists on matching tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([dict(attrs).get("class"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][1] += data

    def __contains__(self, words):
        return " ".join(words.split()) in " ".join(self.text.split())


def report(of, drawn=None, **options):
    text = html(of, drawn or {}, title="A title", **options)
    return text, Page(text)


def plain(text):
    return text.strip().replace("\N{NO-BREAK SPACE}", " ")
