"""The files, modules and functions that README, CONTRIBUTING and the notebooks name exist."""

import re
from importlib import import_module

from tests.lab.pages import code_in, each_page, page_text
from tests.lab.project import ROOT


@each_page
def test_named_files_exist(path):
    """Paths that start with a folder of the project, and its top-level files."""
    ours = r"(?:ddp_lib|tests|notebooks|benchmarks|deploy|docs|\.ci)/[\w./-]*"
    top = r"(?:Makefile|Dockerfile|LICENSE|[\w-]+\.(?:md|toml|yml|txt))"
    for code in code_in(page_text(path)):
        if re.fullmatch(top, code):
            assert (ROOT / code).exists(), code
        for named in re.findall(rf"(?<![\w./~-]){ours}", code):
            assert (ROOT / named.rstrip(".")).exists(), code


@each_page
def test_named_modules_and_functions_exist(path):
    """`ddp_lib.load_dataset`, `torch.distributed.all_reduce` and the like."""
    for code in code_in(page_text(path)):
        if re.fullmatch(r"(?:ddp_lib|torch)(?:\.[A-Za-z_]\w*)+(?:\(.*\))?", code):
            assert resolves(code.partition("(")[0]), code


def resolves(name: str) -> bool:
    module, *rest = name.split(".")
    value = import_module(module)
    for part in rest:
        if not hasattr(value, part):
            try:
                import_module(f"{value.__name__}.{part}")
            except (AttributeError, ImportError):
                return False
        value = getattr(value, part)
    return True


def test_a_name_that_is_gone_is_seen():
    assert resolves("ddp_lib.data.dataset.load_dataset") and resolves("torch.nn.Linear")
    assert not resolves("ddp_lib.data.dataset.gone") and not resolves("torch.gone.Linear")
