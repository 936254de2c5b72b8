"""What the runtime refuses, and that a failed launch leaves nothing behind for the next one."""

import re

import pytest
import simt_host

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))
ENTRY = "host_entry_faults.cpp"
REFUSED = [  # in the order of host_entry_faults.cpp
    ("misaligned copy", "cp.async of 8 bytes: misaligned pointer"),
    ("not in its mask", "the calling lane is not in its mask"),
    ("two places", "meets"),
    ("left the warp", "lane 31 of the mask has exited or never was"),
    ("barrier and shuffle", "__syncthreads at|deadlock: block"),  # by who comes last
    ("two types at one line", "static shared memory of two types"),
    ("too much static", "static shared memory: more than 48 KiB"),
    ("launch inside a kernel", "launch: inside a kernel"),
    ("no block", "launch: empty or oversized"),
    ("1025 threads", "launch: empty or oversized"),
    ("65536 blocks in y", "launch: empty or oversized"),
    ("65 threads in z", "launch: empty or oversized"),
    ("228 KiB", "launch: empty or oversized"),
]


@pytest.fixture(scope="module")
def library():
    return simt_host.load(simt_host.build(ENTRY))


def test_every_fault_has_words(library):
    assert library.faults_count() == len(REFUSED)


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[name for name, _ in REFUSED])
def test_is_refused(library, number, order):
    simt_host.schedule(library, order)
    assert library.faults_run(number) != 0
    assert re.search(REFUSED[number][1], library.simt_error().decode())
    assert library.faults_none() == 0 and library.simt_error() == b""


def test_a_failed_launch_is_no_race():
    """Nor is the good one after it: ThreadSanitizer is told of the threads that were left where they stood."""
    code = (
        "import simt_host, sys; library = simt_host.load(sys.argv[1])\n"
        "for i in (0, 2, 3, 4): assert library.faults_run(i) and library.simt_error() and not library.faults_none()\n"
        "print('clean')"
    )
    simt_host.assert_clean(simt_host.python("tsan", "-c", code, simt_host.build(ENTRY, "tsan")))
