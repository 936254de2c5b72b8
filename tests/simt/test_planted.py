"""The checkers are checked: every planted bug is noticed by the layer that is there for it, and the kernel without one by none."""

import planted
import pytest
import simt_host

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))
PLAIN = ("forward", "reverse", "random")
CAUGHT = {  # bug -> {layer: what it must say there}; other layers may notice, too
    "MissingBarrierRaw": {"TSan": "data race"} | dict.fromkeys(PLAIN, "wrong numbers"),
    "MissingBarrierWar": {"TSan": "data race"},
    "DivergentBarrier": {"forward": "meets the barrier"},
    "EarlyReturn": {"reverse": "has exited and will never arrive", "forward": "deadlock"},
    "MissingWait": {"forward": "wrong numbers"},
    "UnfinishedCopy": {"forward": "ends with a cp.async under way"},
    "WaitWithoutBarrier": {"TSan": "data race"},
    "SharedOutOfBounds": {"ASan + UBSan": "heap-buffer-overflow"},
    "MemberOverrun": {"ASan + UBSan": "index 2 out of bounds"},
    "GlobalOutOfBounds": {"ASan + UBSan": "heap-buffer-overflow"},
    "OutOfMaskShuffle": {"forward": "reads a lane outside the mask"},
    "NonAtomicCounter": {"TSan": "data race"},
    "MisalignedVector": {"ASan + UBSan": "misaligned"},
    "TooLittleShared": {"forward": "shared struct has 2200 bytes, the launch gave 2136"},
    "UninitialisedShared": {"forward": "wrong numbers"},
    "MissingSyncwarp": {"TSan": "data race", "reverse": "wrong numbers", "random": "wrong numbers"},
    "ShuffleForSyncwarp": {"TSan": "data race"},
    "HalfSyncwarp": {"TSan": "data race"},
    "SyncwarpForBarrier": {"TSan": "data race"},
    "WaitAfterBarrier": {"TSan": "data race"},
    "SourceOverwritten": {"TSan": "data race"},
    "MissingFence": {"TSan": "data race"},
}


@pytest.fixture(scope="module")
def verdicts():
    return planted.every_layer()


def test_every_bug_has_a_layer():
    assert ["None", *CAUGHT] == planted.BUGS


@pytest.mark.parametrize("bug", CAUGHT)
def test_is_caught(verdicts, bug, covered):
    for layer, words in CAUGHT[bug].items():
        assert words in verdicts[layer][bug], {name: found[bug] for name, found in verdicts.items()}
    covered["planted bugs caught"] += 1


def test_the_kernel_without_a_bug_is_clean(verdicts):
    assert {found["None"] for found in verdicts.values()} == {""}


def test_a_sanitizer_that_cannot_start_is_no_finding():
    broken = 'import sys; sys.stderr.write("FATAL: ThreadSanitizer: unexpected memory mapping 0x5\\n"); sys.exit(66)'
    with pytest.raises(simt_host.SanitizerBroken, match="nothing of the kernels: FATAL: ThreadSanitizer: unexpected memory mapping"):
        simt_host.python("tsan", "-c", broken)
    with pytest.raises(simt_host.SanitizerBroken, match="nothing of the kernels: signal 11"):
        simt_host.python("asan", "-c", "import os, signal; signal.signal(signal.SIGSEGV, signal.SIG_DFL); os.kill(os.getpid(), 11)")
