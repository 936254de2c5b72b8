"""Triton kernels in the interpreter. Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own,
started by tests/test_interp.py; in any other process there is nothing here to collect."""
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True, scope="session")
def patch_once_a_launch():
    """The interpreter patches triton.language again at every call of a device function, tl.sum included, which takes most of the
    time of a small kernel. Once for each module and launch is enough."""
    from triton.runtime import interpreter

    patched = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        module = self.fn.__globals__["__name__"]
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
