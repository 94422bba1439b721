"""Seeds of different purposes."""

from fastflow.seeds import Stream, derive


def test_no_two_purposes_share_a_stream():
    assert len(Stream) == len(Stream.__members__)
    assert len({derive(0, stream) for stream in Stream}) == len(Stream)
