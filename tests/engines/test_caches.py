"""Which caches go."""

from hypothesis import given
from hypothesis import strategies as st
from launches import config, placement

from l40sd.config.options import Config, DaemonConfig
from l40sd.engines.caches import YOUNG_S, Cache, folder_of, to_remove

NOW_S = 1e9
OLD_S = NOW_S - 10 * YOUNG_S


def cache(name: str, size_bytes: int, used_s: float = OLD_S) -> Cache:
    return Cache(name=name, size_bytes=size_bytes, used_s=used_s)


def test_the_one_longest_unused_goes_first_and_no_more_than_must() -> None:
    caches = [cache("b", 10, OLD_S + 1), cache("a", 10, OLD_S), cache("c", 10, OLD_S + 2), cache("mine", 10, NOW_S)]
    assert to_remove(caches, mine="mine", in_use=(), now_s=NOW_S, limit_bytes=40) == ()
    assert to_remove(caches, mine="mine", in_use=(), now_s=NOW_S, limit_bytes=39) == ("a",)
    assert to_remove(caches, mine="mine", in_use=("a",), now_s=NOW_S, limit_bytes=20) == ("b", "c")
    assert to_remove(caches, mine="mine", in_use=(), now_s=NOW_S, limit_bytes=5) == ("a", "b", "c", "mine")


def test_what_another_worker_may_be_coming_up_with_stays() -> None:
    young = cache("other", 50, NOW_S - 1)
    assert to_remove([young], mine="mine", in_use=(), now_s=NOW_S, limit_bytes=1) == ()


CACHES = st.lists(
    st.builds(cache, st.sampled_from("abcdef"), st.integers(0, 100), st.floats(OLD_S, NOW_S)),
    unique_by=lambda c: c.name,
)


@given(CACHES, st.frozensets(st.sampled_from("abcdef")), st.integers(0, 400))
def test_none_in_use_goes_and_the_rest_is_within_the_limit_or_all_that_may_go_has_gone(
    caches: list[Cache], in_use: frozenset[str], limit_bytes: int
) -> None:
    going = to_remove(caches, mine="a", in_use=in_use, now_s=NOW_S, limit_bytes=limit_bytes)
    assert not in_use & set(going)
    left = [each for each in caches if each.name not in going]
    free = [each for each in left if each.name not in in_use and (each.name == "a" or NOW_S - each.used_s > YOUNG_S)]
    assert sum(each.size_bytes for each in left) <= limit_bytes or not free


def test_replicas_alike_share_a_folder_and_others_do_not() -> None:
    whole = config("vllm")
    folders = [folder_of(placement(tp, first=first), whole) for tp, first in ((1, 0), (1, 3), (2, 0))]
    assert folders[0] == folders[1] == "/var/lib/l40sd/cache/llama-tp1-pp1"
    assert folders[2] == "/var/lib/l40sd/cache/llama-tp2-pp1"
    assert folder_of(placement(), Config(daemon=DaemonConfig(cache_dir="/fast/"))) == "/fast/llama-tp1-pp1"
