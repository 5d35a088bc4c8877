"""Where a reply's bytes go on their way to the client."""

from l40sd.proxy.reply_body import Countdown, Tail, Unchunk


class Source:
    """A connection that can be paused."""

    is_paused = False

    def pause(self, *, is_paused: bool) -> None:
        self.is_paused = is_paused


def test_no_more_is_passed_on_than_the_length_says() -> None:
    passed_on: list[bytes] = []
    countdown = Countdown(passed_on.append, 5)
    countdown(b"abc")
    assert countdown.left_bytes == 2
    countdown(b"de\r\n")
    assert (passed_on, countdown.left_bytes) == ([b"abc", b"de"], 0)


def test_a_client_that_cannot_read_chunks_gets_what_is_in_them() -> None:
    passed_on: list[bytes] = []
    unchunk = Unchunk(passed_on.append)
    unchunk(b"3\r\nabc\r\n2\r")
    unchunk(b"\nde\r\n")
    assert b"".join(passed_on) == b"abcde"


def test_reading_stops_between_two_chunks_and_not_within_one() -> None:
    source, passed_on = Source(), bytearray()
    tail = Tail(source, passed_on.extend, b"3\r\nabc\r\n")
    tail(b"2\r\nde\r\n")
    assert not source.is_paused, "nobody wants it to stop yet"
    tail.stop_between_chunks()
    tail(b"4\r\nfg")
    assert not source.is_paused
    tail(b"hi\r\n")
    assert source.is_paused
    assert passed_on == b"2\r\nde\r\n4\r\nfghi\r\n"
    assert tail.data.endswith(b"fghi\r\n")
