"""The public names: complete, typed, documented, and imported only when they are used."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import imagofs

ROOT = Path(__file__).parents[2]


def test_what_type_checkers_see_is_what_there_is():
    """The imports for type checkers, the table of names and `__all__` are one list."""
    tree = ast.parse(Path(imagofs.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == imagofs._HOME_OF
    assert sorted(imagofs.__all__) == sorted({*typed, "__version__"})
    assert set(imagofs.__all__) <= set(dir(imagofs))
    with pytest.raises(AttributeError, match="no attribute 'File'"):
        imagofs.File  # noqa: B018  # the attribute's absence is the point


def public_functions():
    """Every public class and function with a text of its own, by its name."""
    for name in imagofs.__all__:
        value = getattr(imagofs, name)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue
        yield name, value
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(function, "__func__", function)
            if not member.startswith("_") and (
                inspect.isfunction(function) or isinstance(function, property)
            ):
                yield f"{name}.{member}", getattr(value, member)


def test_everything_is_documented():
    # A method that overrides another has the other's text.
    assert [name for name, value in public_functions() if not inspect.getdoc(value)] == []


def test_errors_are_one_hierarchy():
    for name in imagofs.__all__:
        value = getattr(imagofs, name)
        if inspect.isclass(value) and issubclass(value, BaseException):
            assert issubclass(value, imagofs.ImagofsError)


def python(*arguments):
    """Run Python with warnings as errors, outside of the tree."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_imports_are_lazy_and_silent():
    program = """
import sys, imagofs
assert "trio" not in sys.modules
for name in imagofs.__all__:
    getattr(imagofs, name)
assert "pyfuse3" not in sys.modules and "numpy" not in sys.modules
"""
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_opening_an_image_loads_no_check(tmp_path):
    """A mount starts fast: it takes long to load what only a dirty image needs."""
    program = """
import sys, trio, imagofs
async def open_and_read(path):
    await imagofs.create_image(path, "qcow2", 1 << 20)
    async with await imagofs.open_image(path, writable=True) as image:
        await image.read(bytearray(512), 0)
trio.run(open_and_read, sys.argv[1])
print(*(name for name in sys.modules if "check" in name and "imagofs" in name))
"""
    done = python("-c", program, str(tmp_path / "image.qcow2"))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\n")


def mypy(*arguments):
    # The cache that `make typecheck` fills makes this a matter of a second.
    return subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_a_typed_client():
    assert (ROOT / "imagofs" / "py.typed").exists()
    done = mypy("tests/api/client.py")
    assert done.returncode == 0, done.stdout


def test_a_client_with_wrong_types(tmp_path):
    program = tmp_path / "client.py"
    program.write_text("""
import imagofs
async def client(image: imagofs.FormatAccess) -> None:
    await image.read("text", 0)
    await image.write(b"", "0")
    image.size = 5
""")
    done = mypy(str(program))
    assert done.returncode == 1
    assert done.stdout.count("[arg-type]") == 2, done.stdout
    assert "[method-assign]" in done.stdout
