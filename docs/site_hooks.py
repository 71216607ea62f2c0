"""What the site needs beyond mkdocs.yml: pages from outside of docs/, formulas, and the arguments of ``train``."""

import ast
import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages as they stand, by their address on the site.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Files that pages link to; they keep their path, so that links mean the same on the site as in the repository.
LINKED = (
    "benchmarks/LOG.md",
    "benchmarks/results/*.json*",
    "examples/*.py",
    "examples/*.ipynb",
    "Dockerfile",
    "recipes/*.yaml",
    "CITATION.cff",
)


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


class FunctionsNamedAsTheirModules(griffe.Extension):
    """griffe: where ``ops.row_dot`` exports the function of the module of that name, the page shows the function."""

    def on_package(self, *, pkg, **kwargs):
        for package in [module for module in pkg.modules.values() if module.exports]:
            for name in package.exports:
                module = package.members.get(str(name))
                if module is not None and not module.is_alias and module.is_module and str(name) in module.members:
                    package.set_member(str(name), griffe.Alias(str(name), module[str(name)], parent=package))


class FieldsAsArguments(griffe.Extension):
    """griffe: what ``takes_fields_of(Config)`` decorates gets the fields as parameters, and their help as ``Args``."""

    def on_package(self, *, pkg, **kwargs):
        fields = pkg["training.config.Config"].attributes
        options = {name: option for name, field in fields.items() if (option := _option(field)) is not None}
        entries = "\n".join(f"    {name}: {help_text}" for name, (_, help_text) in options.items())
        for function in (one for module in pkg["commands"].modules.values() for one in module.functions.values()):
            if not function.is_alias and any("takes_fields_of(" in str(of.value) for of in function.decorators):
                parameters = [_parameter(name, fields[name], default) for name, (default, _) in options.items()]
                function.parameters = griffe.Parameters(*parameters)
                docstring = function.docstring
                docstring.value = docstring.value.replace("\nReturns:", f"\nArgs:\n{entries}\n\nReturns:", 1)


def _option(field: griffe.Attribute) -> tuple[str, str] | None:
    """Default and help of a field, ``option(default, help, ...)``; None of what is none."""
    call = ast.parse(str(field.value), mode="eval").body
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "option":
        return None
    default, help_text = call.args[:2]
    return ast.unparse(default), ast.literal_eval(help_text)


def _parameter(name: str, field: griffe.Attribute, default: str) -> griffe.Parameter:
    kind = griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(name, annotation=field.annotation, kind=kind, default=default)


def formulas(text: str) -> str:
    text = re.sub(r"^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|$))+)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    return re.sub(r":(?:func|class|meth):`([^`]+)`", r"`\1`", text)


def _block(match: re.Match) -> str:
    tex = textwrap.dedent(match[2]).strip()
    if "&" in tex or r"\\" in tex:  # several lines, which reStructuredText aligns by itself
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    return textwrap.indent(f"\n$$\n{tex}\n$$\n\n", match[1])
