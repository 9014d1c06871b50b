from __future__ import annotations

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from numbaflash_service.demo.terminal import WordWriter

pieces = st.lists(st.text(st.sampled_from("ab語, \n"), max_size=8), max_size=20)


def written(texts: list[str], width: int | None) -> str:
    out = StringIO()
    with WordWriter(out, width) as writer:
        for text in texts:
            writer.write(text)
    return out.getvalue()


@given(pieces, st.integers(4, 30))
def test_all_words_come_out_in_order_and_no_line_is_wider_than_its_only_word(texts: list[str], width: int) -> None:
    got = written(texts, width)
    assert got.split() == "".join(texts).split()
    for line in got.split("\n"):
        assert cell_len(line) <= width or len(line.split()) == 1


@given(pieces)
def test_without_a_width_the_text_stays_as_it_is(texts: list[str]) -> None:
    assert written(texts, None) == "".join(texts) + "\n"


@given(pieces)
def test_a_text_that_fits_keeps_its_spaces(texts: list[str]) -> None:
    got, expected = written(texts, 1000), "".join(texts) + "\n"
    assert [line.rstrip() for line in got.split("\n")] == [line.rstrip() for line in expected.split("\n")]


def test_a_word_is_written_when_it_is_complete() -> None:
    out = StringIO()
    with WordWriter(out, 10) as writer:
        writer.write("Grav")
        assert out.getvalue() == ""
        writer.write("ity is")
        assert out.getvalue() == "Gravity"
        writer.write(" short")
        assert out.getvalue() == "Gravity is"
    assert out.getvalue() == "Gravity is\nshort\n"
