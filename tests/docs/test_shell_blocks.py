"""What README.md and docs/ tell a reader to type works, and what they point at is there."""

import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.blocks import MARKS, QUICKSTART, ROOT, Block, after_the_quickstart, alone, blocks_of, pages, run_block

PAGES = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in pages()}
ALL = [block for blocks in PAGES.values() for block in blocks]
RUN = [block for block in ALL if block.mark is None]
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href)=\"(?P<html>[^\"]+)\"")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "docs"
    directory.mkdir(exist_ok=True)
    return directory


class Reader:
    """Someone who types the blocks of pages, in order, after the quickstart; each page in the same checkout.

    Only the quickstart takes the programs of a real .venv. It is `venv` after that, whose programs have everything
    imported: tests/test_launch.py and tests/hosts launch with real ones.
    """

    def __init__(self, directory: Path, shared: Path, venv: Path) -> None:
        self.directory, self.shared, self.venv = directory, shared, venv
        self._typed: set[Block] = set()

    def up_to(self, block: Block) -> None:
        """The blocks of its page before this one, as far as they have not run yet (test processes share them out)."""
        for before in PAGES[block.page]:
            if before.mark is None and before not in self._typed:
                self._typed.add(before)
                self._type(before.text)
            if before == block:
                return

    def _type(self, text: str) -> None:
        if text.split("#")[0].strip() == QUICKSTART:
            return  # it has run
        launches = re.search(r"\b(deepspeed|torchrun) ", text)
        with alone(self.shared) if launches else nullcontext():
            run_block(text, self.directory, self.venv)


@pytest.fixture(scope="module")
def reader(shared: Path, warm_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    directory = tmp_path_factory.mktemp("docs") / "checkout"
    after_the_quickstart(shared, directory)
    (directory / ".venv").unlink()
    (directory / ".venv").symlink_to(warm_venv)
    return Reader(directory, shared, warm_venv)


@pytest.mark.network
@pytest.mark.parametrize(
    "block",
    [block if block.page == "README.md" else pytest.param(block, marks=pytest.mark.slow) for block in RUN],
    ids=lambda block: block.name,
)
def test_a_block_runs(reader: Reader, block: Block) -> None:
    reader.up_to(block)


@pytest.mark.parametrize("block", [block for block in ALL if block.mark is not None], ids=lambda block: block.name)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert block.mark is not None
    word, _, reason = block.mark.partition(":")
    assert word in MARKS and reason.strip(), f"{block.name}: <!-- {block.mark} -->: expected one of {MARKS}, then why"


def test_blocks_are_found() -> None:
    assert {"README.md"} <= {block.page for block in RUN} and len(RUN) > 10


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for match in _LINK.finditer(re.sub(r"`[^`]*`", "", text)):
        target = match["target"] or match["html"]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page}: {target}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page}: {target}: no such heading; {sorted(anchors(file))}"


@cache
def anchors(page: Path) -> frozenset[str]:
    """What forges make of headings: lower case, spaces to hyphens, other punctuation gone."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
