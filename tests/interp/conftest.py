"""Triton kernels in the interpreter. Triton reads TRITON_INTERPRET when it is imported, so test_interp_*.py run in a process of their
own, which test_in_the_interpreter.py starts."""
import os

import pytest

collect_ignore_glob = ["test_in_*.py" if os.environ.get("TRITON_INTERPRET") == "1" else "test_interp_*.py"]


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
