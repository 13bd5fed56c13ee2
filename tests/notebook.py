"""Run one notebook as `nbdev_test` does, and let coverage see exported cells as lines of the module they make.

nbdev_test runs a cell under a made-up file name, so the tests that stand beside the code would count for nothing.
Here an exported cell keeps the file name and the line numbers that it has in `hapnb/`.
"""
import ast, re, sys
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler

ROOT = Path(__file__).resolve().parents[1]


def exported_cells():
    "Map the id of each exported cell to (module path, line of its marker)."
    return {m[1]: (str(path), n) for path in sorted((ROOT / "hapnb").glob("*.py"))
            for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if (m := re.match(r"# %% \S+ #(\w+)$", line))}


class InPlace(CachingCompiler):
    "Compile a cell under the name and line numbers given by `place`, if any."
    place = None

    def cache(self, *args, **kwargs): return self.place[0] if self.place else super().cache(*args, **kwargs)

    def ast_parse(self, *args, **kwargs):
        tree = super().ast_parse(*args, **kwargs)
        return ast.increment_lineno(tree, self.place[1]) if self.place else tree


class Shell(CaptureShell):
    "The shell of nbdev_test, with exported cells in their place."
    compiler_class = InPlace
    places = exported_cells()

    def cell(self, cell, **kwargs):
        self.compile.place = self.places.get(cell.get("id"))
        return super().cell(cell, **kwargs)


if __name__ == "__main__":
    nbdev.test.CaptureShell = Shell
    flags = nbdev.test.get_config().tst_flags.split()
    passed, _ = nbdev.test.test_nb(Path(sys.argv[1]).resolve(), skip_flags=flags, basepath=ROOT)
    sys.exit(not passed)
