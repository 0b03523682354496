"""What the tests of HTML pages share: a parser that finds tags left open, and the check that a page stands alone."""

from html.parser import HTMLParser


class Checker(HTMLParser):
    """Collects tags and text; notes tags that are closed in the wrong order or left open."""

    void = frozenset(("meta", "br", "path", "use", "rect", "line", "circle"))

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(path):
    page = Checker()
    page.feed(path.read_text())
    assert page.open == []
    return page


def check_stands_alone(path):
    """No script, nothing fetched."""
    page = check(path)
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    for name, value in page.attributes:
        assert not (name in ("src", "href", "xlink:href") and not value.startswith("#")), (name, value)
    assert "url(http" not in path.read_text() and "@import" not in path.read_text()
