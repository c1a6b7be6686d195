"""Names and disks that the operating system refuses: one message and the right exit code, whichever step meets them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes import cli
from lora_recipes.errors import EXIT_MACHINE, EXIT_USER, machine_fault
from lora_recipes.train import launch
from tests.security.hostile import Maker

LONG = "a" * 5000


def audited(path: Path) -> int:
    return cli.main(["audit", str(path)])


def trained(path: Path) -> int:
    return launch(str(path), [])


@pytest.mark.parametrize("run", [audited, trained])
@pytest.mark.parametrize(
    ("section", "key", "name"),
    [
        ("model", "pretrained_model_name_or_path", LONG),
        ("model", "pretrained_model_name_or_path", "/x" * 4000),
        ("dataset", "data_files", f"/{LONG}"),
        ("training", "chat_template_path", LONG),
    ],
)
def test_a_name_too_long_for_a_file_is_one_message(
    maker: Maker, capsys: pytest.CaptureFixture, run: Callable[[Path], int], section: str, key: str, name: str
):
    path = maker.recipe("r", **{section: {key: name}})
    assert run(path) == EXIT_USER
    said = capsys.readouterr().err
    assert "error: " in said and len(said) < 1500, said


@pytest.mark.parametrize(
    ("number", "exit_code", "said"),
    [
        (errno.ENAMETOOLONG, EXIT_USER, "... (5,000 characters): File name too long"),
        (errno.ELOOP, EXIT_USER, "Too many levels of symbolic links"),
        (errno.EIO, EXIT_MACHINE, "Input/output error"),
    ],
)
def test_what_the_system_says_of_a_file_has_an_exit_code(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int, said: str
):
    error = OSError(number, os.strerror(number), LONG)
    fault = machine_fault(error)
    assert fault is not None and fault.exit_code == exit_code
    assert said in str(fault)
    assert machine_fault(OSError(errno.ENOENT, "x")) is None

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_recipe", broken)
    monkeypatch.setattr("lora_recipes.train.load_recipe", broken)
    assert audited(maker.recipe("r")) == trained(maker.recipe("r")) == exit_code
