"""tools/convert_checkpoint.py as a user runs it: the real command in a process of its own."""

from tests.helpers.launch import Launch, launch

TOOL = "tools/convert_checkpoint.py"


def convert(*words: object) -> Launch:
    """Run a command to its end."""
    return launch(1, TOOL, *words)


def converted(*words: object) -> str:
    """What a command prints that must succeed."""
    done = convert(*words)
    assert done.codes == [0], done.stderr
    return done.stdout


def refused(*words: object) -> str:
    """The one line of a command that must fail."""
    done = convert(*words)
    assert done.codes == [2], done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
