import pytest


@pytest.fixture(scope="session")
def cover(covered):
    """Counts kernels and cubins once, however many tests look at them."""
    names, cubins = set(), set()

    def cover(kernels):
        names.update((kernel.source, kernel.op, kernel.name) for kernel in kernels)
        cubins.update(kernel.cubin for kernel in kernels)
        covered["aot kernels"], covered["cubins"] = len(names), len(cubins)

    return cover


@pytest.fixture(scope="module", autouse=True)
def fresh_triton_cache(tmp_path_factory):
    """A cache hit would hide that a kernel no longer compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="session")
def needs_nvcc():
    import cubins

    if reason := cubins.missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def needs_triton():
    import sass

    if reason := sass.missing_triton():
        pytest.skip(reason)
