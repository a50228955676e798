"""Hooks of mkdocs: pages that are made from the code, and links to files of the repository outside `docs/`.

A page that loads a script, style, font or image from elsewhere is a warning, and so an error in strict mode.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from pages import pages  # noqa: E402

_FOREIGN = re.compile(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="(?:https?:)?//[^"]*"')
_OUTSIDE = re.compile(r"\]\(\.\./((?:recipes|examples|CHANGELOG)[^)#]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add made pages, recipes and examples."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for source in sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*.py"), ROOT / "CHANGELOG.md"]):
        name = str(source.relative_to(ROOT))
        files.append(File.generated(config, name.replace("CHANGELOG", "changelog"), content=source.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to those files stay inside the site."""
    return _OUTSIDE.sub(lambda found: f"]({found[1].replace('CHANGELOG', 'changelog')})", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The site is self-contained."""
    for found in _FOREIGN.findall(output):
        logging.getLogger("mkdocs.hooks").warning("%s loads from elsewhere: %s", page.file.src_uri, found)
    return output
