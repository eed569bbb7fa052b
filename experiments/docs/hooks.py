"""What the site is given while it is built: a reference page per public module, and the page of results.

Both follow from other files of the repository, so that nothing is written twice. mkdocs calls the functions `on_*`.
"""

import ast
import pathlib
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "RESULTS.md"
SECTIONS = ("data", "models", "nn", "optim", "train")


def public_modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module of which no part begins with an underscore; `mtjax` first."""
    modules = {}
    for path in sorted((ROOT / "mtjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            modules[".".join(parts)] = path
    return dict(sorted(modules.items()))


def page_of(module: str) -> str:
    return f"reference/{module}.md"


def reference_nav(modules: dict[str, pathlib.Path]) -> list[dict[str, Any]]:
    """Modules of the package itself, then a section for each subpackage."""
    top = [
        {name: page_of(name)} for name in modules if name.split(".")[1:2] == [] or name.split(".")[1] not in SECTIONS
    ]
    sections = []
    for section in SECTIONS:
        inside = [name for name in modules if name.split(".")[1:2] == [section]]
        sections.append({f"mtjax.{section}": [{name: page_of(name)} for name in inside]})
    return [*top, *sections]


def names_of_package(module: str, path: pathlib.Path, modules: dict[str, pathlib.Path]) -> str:
    """A table of what a package offers: name, and the first line of its docstring, linked to where it is defined."""
    rows = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or node.module not in modules:
            continue
        for alias in node.names:
            if f"{node.module}.{alias.name}" in modules:  # a module of its own
                continue
            definition = definition_of(modules[node.module], alias.name)
            if definition and not alias.name.startswith("_"):
                target = f"{node.module}.{alias.name}"
                rows.append(f"| [`{alias.name}`]({node.module}.md#{target}) | {definition.replace('|', '&#124;')} |")
    return "\n".join(["| name | what it is |", "|---|---|", *sorted(rows)]) if rows else ""


def definition_of(path: pathlib.Path, name: str) -> str | None:
    """The first line of the docstring of a function or class of a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0].replace("<", "&lt;")
    return None


def reference_page(module: str, path: pathlib.Path, modules: dict[str, pathlib.Path]) -> str:
    """The text of a module's page; packages show what they offer, modules all that they define."""
    if path.name != "__init__.py":
        return f"# {module}\n\n::: {module}\n"
    table = names_of_package(module, path, modules)
    return f"# {module}\n\n::: {module}\n    options:\n      members: false\n\n{table}\n"


def results_page() -> tuple[str, dict[str, pathlib.Path]]:
    """The page of results, and its figures: path in the site -> file. RESULTS.md is written by `experiments.report`."""
    if not RESULTS.exists():
        return "# Results\n\nNot written yet: `python -m experiments.report` writes them.\n", {}
    figures = {}

    def moved(match: re.Match) -> str:
        source = (RESULTS.parent / match[2]).resolve()
        figures[f"measured/figures/{source.name}"] = source
        return f"![{match[1]}](figures/{source.name})"

    text = re.sub(r"!\[([^]]*)\]\(([^)\s]+)\)", moved, RESULTS.read_text())
    # Links to other files of the repository lead nowhere in the site: their text stays.
    text = re.sub(r"(?<!!)\[([^]]+)\]\((?!#|https?:|figures/)[^)]*\)", r"\1", text)
    return text.replace("<details>", '<details markdown="1">'), figures


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference enters the navigation."""
    config.nav.append({"Reference": reference_nav(public_modules())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages and figures that are in no folder of the site."""
    modules = public_modules()
    for module, path in modules.items():
        files.append(File.generated(config, page_of(module), content=reference_page(module, path, modules)))
    text, figures = results_page()
    files.append(File.generated(config, "measured/results.md", content=text))
    for target, source in figures.items():
        files.append(File.generated(config, target, abs_src_path=str(source)))
    return files
