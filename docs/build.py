#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Build the site: put docs/ and the pages that lie elsewhere in the repository into one folder, write
the page of all options, lead links to pages, and call the site's generator. A link to a file that
is not there, and any warning of the generator, is an error.

Example:
  python docs/build.py          # or: make docs; then open build/docs/index.html
"""

import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import options

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build/docs_source"  # docs_dir of mkdocs.yml
DEFAULTS = "mokd_det/config/defaults.py"
# File of the repository -> page of the site. The rest of docs/ keeps its names.
PAGES = {
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "MODEL_ZOO.md": "model_zoo.md",
    "SECURITY.md": "security.md",
    "datasets/README.md": "datasets.md",
    "tools/README.md": "commands.md",
    DEFAULTS: "configuration.md",
}
# Blocks of code are left as they are.
PARTS = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def all_pages() -> dict[str, str]:
    """Return file of the repository -> file of the site: Markdown, pictures and style."""
    kinds = (".md", ".svg", ".jpg", ".png", ".css")
    files = (path for path in (ROOT / "docs").rglob("*") if path.suffix in kinds)
    own = {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs") for path in files}
    return {file: page.as_posix() for file, page in own.items()} | PAGES


def relinked(text: str, file: str, pages: dict[str, str]) -> str:
    """
    Return a page with its links leading to pages. A link to another file of the repository becomes
    the file's name: the site does not know where the repository is read.

    Raises:
        FileNotFoundError: a link leads to no file.
    """

    def relink(match):
        mark, label, target = match.groups()
        if re.match(r"#|https?:|mailto:", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if path not in pages and not (ROOT / path).exists():
            raise FileNotFoundError(f"{file} links to '{target}', which does not exist.")
        if path not in pages:
            return label if Path(path).stem in label else f"{label} (`{path}`)"
        to = posixpath.relpath(pages[path], posixpath.dirname(pages[file]) or ".")
        return f"{mark}[{label}]({to}{'#' + anchor if anchor else ''})"

    parts = PARTS.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(relink, part) for part in parts)


def assemble(folder: Path) -> None:
    """Write the Markdown of the whole site into a folder, and remove what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = all_pages()
    for file, page in pages.items():
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == DEFAULTS:
            target.write_text(options.page(ROOT / file))
        elif file.endswith(".md"):
            target.write_text(relinked((ROOT / file).read_text(), file, pages))
        else:
            shutil.copy(ROOT / file, target)


def generate() -> int:
    """Make the site of what is in SOURCE, and return 0 if there was not even a warning."""
    # Not --quiet: it keeps warnings from --strict, too. The variable silences an advertisement.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    assemble(SOURCE)
    sys.exit(generate())


if __name__ == "__main__":
    main()
