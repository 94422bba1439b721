"""Tables of the documentation whose every row a test shows."""

import re

from tests.support.pages import ROOT


class Table:
    """The table of a page whose first line of cells begins with ``heading``; tests name the rows that they show."""

    def __init__(self, page, heading):
        text = (ROOT / page).read_text().partition(f"\n| {heading} |")[2].partition("\n\n")[0]
        self.left = re.findall(r"^\| (.+?) \| ", text, re.MULTILINE)[0:]
        assert self.left, f"{page} has no table {heading}"
        self._all = list(self.left)

    def shows(self, *beginnings):
        """A decorator of a test that shows the rows with these beginnings."""
        for beginning in beginnings:
            found = [row for row in self._all if row.startswith(beginning)]
            assert len(found) == 1, f"{beginning!r} begins {len(found)} rows"
            self.left = [row for row in self.left if row not in found]
        return lambda test: test
