"""Write the generated documentation pages: flags from the argument parser, the compile matrix from the tests.

PYTHONPATH=. python scripts/generate_docs.py [--check]

With --check nothing is written, and the exit code is 1 if a page is out of date.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxserve.arguments import build_parser

ROOT = Path(__file__).parents[1]
FLAGS = ROOT / "docs" / "serving" / "flags.md"
MATRIX = ROOT / "docs" / "compile-matrix.md"
STEPS = ROOT / "tests" / "compile" / "test_steps.py"


def flags() -> str:
    """Return the page of flags, with a table for each group."""
    lines = [
        "# Flags",
        "",
        "Flags of `jaxserve serve` (`python -m jaxserve.launch`), with SGLang's names and meanings. They may come from",
        "a file, `--config FILE.yaml`, names without the dashes; flags on the command line win.",
    ]
    parser = build_parser()
    for group in parser._action_groups:  # noqa: SLF001  (argparse has no public way to list them)
        own = group._group_actions  # noqa: SLF001
        actions = [action for action in own if action.option_strings and action.dest != "help"]
        if not actions:
            continue
        lines += ["", f"## {(group.title or '').capitalize()}", "", "| flag | default | |", "| --- | --- | --- |"]
        for action in actions:
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            default = "" if action.default in (None, argparse.SUPPRESS, []) else f"`{action.default}`"
            choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
            text = (action.help or "").replace("|", "\\|").replace("%%", "%")
            lines.append(f"| {names} | {default} | {text}{choices} |")
    return "\n".join(lines) + "\n"


def matrix() -> str:
    """Return the compile matrix, with a table for each test that compiles steps, from its parameters."""
    lines = [
        "# Compile matrix",
        "",
        "Whole steps that the devices' own compilers take, kernels included, without the devices. Each row is a case",
        "of `tests/compile/test_steps.py`; rows marked *all* run with `scripts/test --all`.",
    ]
    for title, names, cases in _tables(ast.parse(STEPS.read_text())):
        lines += ["", f"## {title}", "", f"| {' | '.join(names)} | |", f"| {'| '.join(['--- '] * len(names))}| --- |"]
        lines += [f"| {' | '.join(values)} | {'all' if slow else ''} |" for values, slow in cases]
    return "\n".join(lines) + "\n"


def _tables(tree: ast.Module) -> Iterator[tuple[str, list[str], list[tuple[list[str], bool]]]]:
    """Yield title, parameter names and cases of each test with a parameter `target`."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for decorator in function.decorator_list:
            if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize")):
                continue
            names = ast.literal_eval(decorator.args[0])
            names = [names] if isinstance(names, str) else list(names)
            values = decorator.args[1]
            values = constants[values.id] if isinstance(values, ast.Name) else values
            if "target" in names and isinstance(values, ast.List):
                title = function.name.removeprefix("test_").replace("_", " ").capitalize()
                yield title, names, [_case(case) for case in values.elts]


def _case(node: ast.expr) -> tuple[list[str], bool]:
    """Return the values of a case and whether it is marked slow."""
    slow = isinstance(node, ast.Call)
    values = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else [node]
    return [str(ast.literal_eval(value)) for value in values], slow


def main() -> int:
    """Write or check the pages."""
    pages = {FLAGS: flags(), MATRIX: matrix()}
    if "--check" not in sys.argv:
        for path, text in pages.items():
            path.write_text(text)
        return 0
    stale = [
        str(path.relative_to(ROOT)) for path, text in pages.items() if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        print(f"{path} is out of date: run scripts/generate_docs.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
