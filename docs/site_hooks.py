"""What the site needs beyond mkdocs.yml: pages from outside of docs/, and the formulas of the docstrings."""

import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages as they stand, by their address on the site.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Files that pages link to; they keep their path, so that links mean the same on the site as in the repository.
LINKED = ("benchmarks/LOG.md", "benchmarks/results/*.json*", "examples/*.py", "recipes/*.yaml", "CITATION.cff")


def on_files(files, config):
    """mkdocs: adds the pages and the files that lie outside of docs/."""
    paths = {path.relative_to(ROOT).as_posix(): path for pattern in LINKED for path in ROOT.glob(pattern)}
    for address, path in {**paths, **{address: ROOT / name for address, name in PAGES.items()}}.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs: links as the repository has them become links as the site has them."""
    addresses = {name: address for address, name in PAGES.items()}

    def moved(link):
        # On the site, docs/ and the folder that it is in are one.
        target = re.sub(r"^(\.\./|docs/)", "", link[1])
        return f"]({addresses.get(target, target)}"

    return re.sub(r"\]\(([^):#\s]+)(?=[)#])", moved, markdown)


class Formulas(griffe.Extension):
    """griffe: formulas of reStructuredText, as ``help`` shows them, become those that MathJax finds on a page."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = formulas(obj.docstring.value)


def formulas(text: str) -> str:
    text = re.sub(r"^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|$))+)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    return re.sub(r":(?:func|class|meth):`([^`]+)`", r"`\1`", text)


def _block(match: re.Match) -> str:
    tex = textwrap.dedent(match[2]).strip()
    if "&" in tex or r"\\" in tex:  # several lines, which reStructuredText aligns by itself
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    return textwrap.indent(f"\n$$\n{tex}\n$$\n\n", match[1])
