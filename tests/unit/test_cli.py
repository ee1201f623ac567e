"""The `jaxserve` command passes its flags to the named subcommand, prints its usage, and refuses unknown ones."""

import pytest

from jaxserve import cli


@pytest.mark.parametrize(
    ("command", "flag"), [("serve", "--model-path"), ("plan", "--target"), ("convert", "--merge-lora")]
)
def test_help_of_a_command(
    command: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jaxserve", command, "--help"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["jaxserve", *arguments])
    assert cli.main() == 0
    assert capsys.readouterr().out == cli.USAGE


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["jaxserve", "frobnicate"])
    assert cli.main() == 2
    assert "unknown command 'frobnicate'" in capsys.readouterr().err
