"""The shell blocks of README.md and docs/, and fresh copies of the checkout to run them in."""

import fcntl
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARKS = ("slow", "root", "gpu", "not run")
QUICKSTART = "bash launch/quickstart.sh"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)")
_COMMENT = re.compile(r"^ *<!-- *(?P<text>.*?) *-->$")


@dataclass(frozen=True)
class Block:
    """One ```bash block of a page.

    Attributes:
        mark: the text of an HTML comment directly above the fence, such as "slow: an hour"; None: the block is run.
    """

    page: str
    line: int
    mark: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md first, then docs/ by name."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The ```bash blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        if fence["language"] == "bash":
            comment = _COMMENT.match(lines[number - 1]) if number else None
            indent = len(fence["indent"])
            text = "".join(line[indent:] + "\n" for line in lines[number + 1 : end])
            mark = comment["text"] if comment else None
            found.append(Block(page.relative_to(ROOT).as_posix(), number + 1, mark, text))
        number = end + 1
    return found


def copy_checkout(target: Path) -> None:
    """The files that git tracks or would track, as they are now, with this environment as `.venv`."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(sys.prefix)


@contextmanager
def alone(shared: Path) -> Iterator[None]:
    """One test process at a time: launchers as a reader calls them all take port 29500."""
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def after_the_quickstart(shared: Path, target: Path) -> None:
    """A copy of the checkout in which the quickstart has run; it runs once, whatever the number of test processes.

    Args:
        shared: a directory that the processes of one test run share.
    """
    ready = shared / "ready"
    with alone(shared):
        if not ready.exists():
            shutil.rmtree(shared / "checkout", ignore_errors=True)
            copy_checkout(shared / "checkout")
            run_block(QUICKSTART, shared / "checkout")
            ready.touch()
    shutil.copytree(shared / "checkout", target, symlinks=True)


def run_block(text: str, directory: Path, venv: Path | None = None) -> None:
    """Run a block as bash would read it from a file, but end at the first command that fails.

    Args:
        venv: has the programs to take, unless the block activates .venv itself.

    Raises:
        AssertionError: it failed; with the block and the end of its output.
    """
    first = f"export PATH={venv}/bin:$PATH\n" if venv else ""
    command = ["bash", "-euo", "pipefail", "-c", f"source .venv/bin/activate\n{first}{text}"]
    done = subprocess.run(
        command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail = "\n".join(done.stdout.splitlines()[-40:])
    assert done.returncode == 0, f"exit code {done.returncode} of\n\n{text}\nwhich printed\n\n{tail}"
