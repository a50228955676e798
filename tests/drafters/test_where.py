"""Names of drafters: folders, the one in the package, repositories on the hub."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vsd.drafters import where
from vsd.drafters.load import family_of
from vsd.drafters.where import EMBEDDED, drafter_folder
from vsd.errors import MismatchError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """A hub that has owner/name only; what was asked of it."""
    asked: list[tuple[str, Any]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "owner/name":
            raise OSError("404\nno such repository")
        return str(tmp_path)

    monkeypatch.setattr(where, "snapshot_download", download)
    where._downloaded.cache_clear()
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_drafter_comes_with_the_package() -> None:
    folder = drafter_folder(EMBEDDED)
    assert family_of(EMBEDDED).title == "EAGLE-3 drafter"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [8192, 576]


def test_a_repository_is_downloaded_once_and_without_pickles(hub: list[tuple[str, Any]], tmp_path: Path) -> None:
    assert drafter_folder("owner/name") == drafter_folder(Path("owner/name")) == tmp_path
    ((name, patterns),) = hub
    assert name == "owner/name" and not any(pattern.endswith(("bin", "pt", "py", "*")) for pattern in patterns)


def test_folders_come_first(hub: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert drafter_folder("owner/name") == Path("owner/name")
    assert drafter_folder("owner/nam") == Path("owner/nam")  # a mistyped path: its parent is here
    for path in ("/a/b", "./a/b", "a", "a/b/c", "~/a"):
        assert drafter_folder(path) == Path(path).expanduser()
    assert not hub


def test_a_name_that_is_nowhere_is_one_line(hub: list[tuple[str, Any]]) -> None:
    with pytest.raises(MismatchError, match=r"^there is no folder 'owner/other', and the hub .* 404 no such") as raised:
        family_of("owner/other")
    assert "\n" not in str(raised.value)
