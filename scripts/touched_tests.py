"""`make test-fast`: the quick tests of what differs from main. `make test-fast ARGS=--all`: all quick tests.

A changed test file stands for itself. Any other changed file stands for the test files that name it: a module by its
dotted name or an import of it, anything else by its path or file name. Where no test names a module, those of the
modules that import it count. Quick is what tests/conftest.py does not mark slow; how many slow tests were left is said.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("igrpo", "igrpo_kernels", "benchmarks", "experiments")
# What a change reaches without being named, by how its path begins.
REACHES = {
    "csrc/": [f"tests/kernels/test_{name}.py"
              for name in ("cpu_ops", "cpu_operators", "cpu_linear", "kept_gradients", "cuda_sources", "cuda_emulated",
                           "cuda_plan")],
    "tests/kernels/cuda_emulator/": ["tests/kernels/test_cuda_emulated.py"],
    "tests/kernels/triton_kernels/": ["tests/kernels/test_triton_suite.py"],
    "docs/": ["tests/test_docs.py", "tests/test_pages.py", "tests/test_readme.py"],
    "README.md": ["tests/test_docs.py", "tests/test_readme.py"],
    "recipes/": ["tests/test_recipes.py"],
    "examples/": ["tests/test_examples.py"],
    "setup.py": ["tests/test_install.py"],
    "pyproject.toml": ["tests/test_install.py"],
    "MANIFEST.in": ["tests/test_install.py"],
    "Makefile": ["tests/test_touched_tests.py"],
}  # fmt: skip
ALWAYS = ["tests/test_limits.py", "tests/test_imports.py"]


def main() -> int:
    words = sys.argv[1:]
    everything = "--all" in words
    words = [word for word in words if word != "--all"]
    files = [] if everything else tests_of(changed_files())
    print("all quick tests, in two processes" if everything else "quick tests of\n  " + "\n  ".join(files), flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *words]
    command += ["-n", "2", "--dist", "loadfile"] if everything else files
    return subprocess.run(command, cwd=ROOT).returncode


def changed_files() -> list[str]:
    """What differs from where this branch left main (on main: from the last commit), and files git does not know."""
    here, main = git("rev-parse", "HEAD"), git("merge-base", "HEAD", "main")
    base = main[0] if main and main != here else "HEAD"
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def git(*words: str) -> list[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.split()


def tests_of(changed: list[str]) -> list[str]:
    found = set(ALWAYS)
    for name in changed:
        found |= {test for start, tests in REACHES.items() if name.startswith(start) for test in tests}
        found |= tests_naming(name, all_names(), seen=set())
    return sorted(name for name in found if (ROOT / name).is_file())


@functools.cache
def all_names() -> dict[str, set[str]]:
    files = [path for folder in ("tests", *SOURCES) for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): names_in(path.read_text(encoding="utf-8")) for path in files}


def names_in(text: str) -> set[str]:
    """Modules that a file imports or writes out, each with what is before its dots, and the file names it writes."""
    names = set()
    for word in re.findall(r"[\w.-]+", text):
        names.add(word)
        if word.startswith(tuple(f"{package}." for package in (*SOURCES, "tests"))):
            names |= {word[: end.start()] for end in re.finditer(r"\.", word) if "." in word[: end.start()]}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"import {node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {f"import {alias.name}" for alias in node.names}
    return names


def tests_naming(name: str, names: dict[str, set[str]], seen: set[str]) -> set[str]:
    """Test files that name the file `name`, else those that name a module which names it."""
    seen.add(name)
    if re.fullmatch(r"tests/(.*/)?test_\w+\.py", name):
        return {name}
    path = Path(name)
    called = {path.name}
    if path.suffix == ".py":
        module = ".".join(path.with_suffix("").parts)
        if path.stem == "__init__":  # it runs for whoever imports anything of its package
            package = module.removesuffix(".__init__")
            called = {f"import {package}"} | ({package} if "." in package else set())
        else:
            called = {path.name, module}
    users = {user for user, there in names.items() if user not in seen and not called.isdisjoint(there)}
    tests = {user for user in users if user.startswith("tests/")}
    return set().union(*(tests_naming(user, names, seen) for user in tests or users))


if __name__ == "__main__":
    sys.exit(main())
