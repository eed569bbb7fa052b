"""Has the code behind a committed result changed since? Compared definition by definition, along static imports.

A result rests on its script and on what the script reaches: from a definition to the names that it uses, through
imports, to the definitions of these names in this repository, and so on. Both sides (the commit that the result names,
and the working tree) are read this way, and every definition that is reached must be equal on both, as a syntax tree
without docstrings. Comments, formatting, documentation, files that no import leads to, and functions of a reached file
that nothing calls are therefore no change. What a file does when it is imported counts as soon as one of its
definitions is reached; a module that is passed around as a value counts with all of its names.

What is not seen: other versions of JAX and of other packages (a result lists those it was measured with), data files,
names that are looked up by strings, and what is named in a type annotation only. A class is one definition: its methods
are not told apart.
"""

import ast
import collections
import dataclasses
import fnmatch
import functools
import pathlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

CANNOT_CHANGE_NUMBERS = {
    "mtjax/plots*.py:*": "figures are drawn of what was measured",
    "mtjax/train/tables.py:*": "tables are printed of what was measured",
    "mtjax/train/command.py:*": "the command line: errors, run directories, where results are copied",
    "mtjax/train/profiling.py:*": "traces are written beside the training",
    "mtjax/train/runlog.py:*": "progress is written for people to read",
    "mtjax/train/report.py:provenance": "where a run took place is written down",
    "mtjax/train/checkpoint.py:*": "states are stored, and come back to the bit (tests/train/test_checkpoint.py)",
    "mtjax/train/checksums.py:*": "damaged checkpoints are found",
    "mtjax/dryrun.py:*": "a dry run trains nothing",
    "*:__version__": "a name for users",
    "*:__all__": "names for users",
}
"""Definitions that are not followed, as patterns of file:name, and why."""

Read = Callable[[str], str | None]
"""Path in the repository -> text of the file, None if there is none."""


class Definition(NamedTuple):
    """A name at the top level of a file; the empty name is what the file does when it is imported."""

    path: str
    name: str


class Change(NamedTuple):
    """What differs in a file."""

    path: str
    names: list[str]
    """Definitions that differ, are new, or are gone; empty if the file itself is new or gone."""

    def __str__(self) -> str:
        return f"`{self.path}`" + (f" ({', '.join(self.names)})" if self.names else "")


@dataclasses.dataclass
class _Module:
    """The top level of a file: which statements bind a name, and which import does."""

    statements: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    """Bound name -> (module, name in it, or None for the module itself)."""


def changes(script: str, before: Read, after: Read) -> list[Change]:
    """What differs between two trees in the code that a script rests on.

    Args:
      script: path in the repository.
      before, after: the two trees.

    Returns:
      The files that differ, by path; none if the code is the same.
    """
    old, new = reached(script, before), reached(script, after)
    found = collections.defaultdict(list)
    for path, name in sorted(old.keys() | new.keys()):
        if old.get((path, name)) != new.get((path, name)):
            found[path].append(name)
    gone = {path for path in found if before(path) is None or after(path) is None}
    return [
        Change(path, [] if path in gone else [name or "on import" for name in found[path]]) for path in sorted(found)
    ]


def reached(script: str, read: Read) -> dict[Definition, str]:
    """Every definition that a script rests on, with its code as a syntax tree without docstrings."""
    tree = _Tree(read)
    module = tree.module(script)
    if module is None:
        return {}
    found: dict[Definition, str] = {}
    todo = [Definition(script, name) for name in module.statements]
    while todo:
        definition = todo.pop()
        if definition in found or _cannot_change_numbers(definition):
            continue
        module = tree.module(definition.path)
        statements = module.statements.get(definition.name, [])
        found[definition] = "\n".join(map(_code, statements))
        todo += [Definition(path, "") for path in tree.imported_with(definition.path)]
        for statement in statements:
            todo += tree.used_by(statement, definition.path)
    return {definition: code for definition, code in found.items() if code}


def _cannot_change_numbers(definition: Definition) -> bool:
    return any(fnmatch.fnmatch(":".join(definition), pattern) for pattern in CANNOT_CHANGE_NUMBERS)


class _Tree:
    """The Python files of one tree, and where names lead."""

    def __init__(self, read: Read):
        self._read = functools.cache(read)

    def module(self, path: str) -> _Module | None:
        text = self._read(path)
        return None if text is None else _parsed(text)

    def imported_with(self, path: str) -> Iterator[str]:
        """The file and the packages around it, all of which Python runs when it imports the file."""
        yield path
        for folder in pathlib.PurePosixPath(path).parents:
            package = (folder / "__init__.py").as_posix()
            if self._read(package) is not None:
                yield package

    def used_by(self, statement: ast.stmt, path: str) -> Iterator[Definition]:
        """The definitions that a statement of a file names."""
        module = self.module(path)
        # An import inside of a function binds a name of that function.
        scope = module.imports | dict(_imports(ast.walk(statement)))
        for chain in _chains(statement):
            if chain[0] in scope:
                yield from self._follow(path, *scope[chain[0]], chain[1:])
            elif chain[0] in module.statements:
                yield Definition(path, chain[0])

    def _follow(self, path: str, dotted: str, name: str | None, rest: Sequence[str]) -> Iterator[Definition]:
        """From an import in the file `path`, and the attributes that are taken of it."""
        rest = ([name] if name else []) + list(rest)
        file = self._file_of(path, dotted)
        while file is not None and rest:
            module = self.module(file)
            if rest[0] in module.statements:
                yield Definition(file, rest[0])
                return
            inside = self._file_of(path, f"{dotted}.{rest[0]}")
            if rest[0] in module.imports and not (inside and module.imports[rest[0]] == (dotted, rest[0])):
                yield from self._follow(file, *module.imports[rest[0]], rest[1:])
                return
            dotted, rest, file = f"{dotted}.{rest[0]}", rest[1:], inside
        if file is not None:  # the module as a value: everything in it
            module = self.module(file)
            yield from (Definition(file, each) for each in module.statements)
            for each in module.imports:
                if not each.startswith("_"):
                    yield from self._value(file, each)

    def _value(self, file: str, name: str) -> Iterator[Definition]:
        """What a package passes on under a name, without following modules that are imported for their own use."""
        dotted, inner = self.module(file).imports[name]
        if inner and file.endswith("__init__.py") and self._file_of(file, f"{dotted}.{inner}") is None:
            yield from self._follow(file, dotted, inner, ())

    def _file_of(self, path: str, dotted: str) -> str | None:
        """The file of a module as imported from the file `path`: of the repository's root, or beside a script."""
        inside = dotted.replace(".", "/")
        for folder in ("", f"{pathlib.PurePosixPath(path).parent.as_posix()}/"):
            for found in (f"{folder}{inside}/__init__.py", f"{folder}{inside}.py"):
                if self._read(found) is not None:
                    return found
        return None


@functools.cache
def _parsed(text: str) -> _Module:
    statements = collections.defaultdict(list)
    imports = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports |= dict(_imports([statement]))
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
            bound = list(_bound(statement))
            for name in bound or [""]:
                statements[name].append(statement)
            if not bound:
                imports |= dict(_imports(ast.walk(statement)))  # if TYPE_CHECKING, try ... except ImportError
    return _Module(dict(statements), imports)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement at the top level defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Bound name -> (module, name in it) of import statements; those of this repository are absolute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else alias.name.partition(".")[0]  # `import a.b` binds a
                yield alias.asname or module, (module, None)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)


def _chains(statement: ast.stmt) -> Iterator[list[str]]:
    """['a', 'b', 'c'] for every a.b.c that a statement reads, longest only, outside of type annotations."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        attributes, base = [], node
        while isinstance(base, ast.Attribute):
            attributes.append(base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            yield [base.id, *reversed(attributes)]
        else:
            skipped = {id(getattr(base, field, None)) for field in ("annotation", "returns")}
            todo += [child for child in ast.iter_child_nodes(base) if id(child) not in skipped]


@functools.cache
def _code(statement: ast.stmt) -> str:
    """A statement as a syntax tree, without positions, comments and docstrings."""
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.dump(statement)


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, of a function or of the attribute above it: a string that nothing uses."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


# Where trees come from.


class NoHistoryError(Exception):
    """There is no git, no repository, or only part of its history; the message is a sentence without its full stop."""


class UnknownCommitError(Exception):
    """A whole history does not hold the commit."""


def working_tree(root: pathlib.Path) -> Read:
    """The files under a folder."""

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return read


def at_commit(root: pathlib.Path, commit: str) -> Read:
    """The files of a commit of the repository at a folder.

    Raises:
      NoHistoryError: if git or the repository is missing, or the history has been cut off.
      UnknownCommitError: if the commit is not in the history.
    """
    blobs = _blobs(root, commit)

    def read(path: str) -> str | None:
        return _git(root, "cat-file", "blob", blobs[path]) if path in blobs else None

    return read


@functools.cache
def _blobs(root: pathlib.Path, commit: str) -> Mapping[str, str]:
    """Path -> object name of every Python file of a commit."""
    _git(root, "rev-parse", "--git-dir")
    if not _is_commit(root, commit):
        if _git(root, "rev-parse", "--is-shallow-repository").strip() == "true":
            raise NoHistoryError(
                f"This clone is shallow and lacks commit {commit[:10]}; `git fetch --unshallow` brings the history"
            )
        raise UnknownCommitError(f"its commit {commit[:10]} is unknown to git")
    lines = _git(root, "ls-tree", "-r", "--full-tree", commit).splitlines()
    files = (line.split("\t") for line in lines)
    return {path: about.split()[2] for about, path in files if path.endswith(".py")}


def _is_commit(root: pathlib.Path, commit: str) -> bool:
    try:
        return _git(root, "cat-file", "-t", f"{commit}^{{commit}}").strip() == "commit"
    except NoHistoryError:
        return False


@functools.cache
def _git(root: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, encoding="utf-8").stdout
    except FileNotFoundError:
        raise NoHistoryError("git is not installed") from None
    except subprocess.SubprocessError as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NoHistoryError(f"git says: {words[0].rstrip('.') if words else 'nothing, but fails'}") from None
