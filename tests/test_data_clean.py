"""Measures, cleaning rules and what they say they did; boilerplate lines; a benchmark in the data."""
import collections
import random
import unicodedata

import numpy as np
import pytest

from tinyllm.data import CleanConfig, Document, Dropped, clean, contamination
from tinyllm.data.clean import EDITS, Cleaner, broken_limit, mask_email, mask_ip, mask_phone, to_nfc, without_control
from tinyllm.data.contamination import contamination_naive, words
from tinyllm.data.lines import LineCounts
from tinyllm.data.measures import SPACE, UNSPACED, WORD, kinds, measures

PLAIN = CleanConfig(boilerplate=0)
ENGLISH = "It was late when the two of them reached the village, and no window was lit any more."
GOOD = {
    "English": ENGLISH,
    "German": "Am Abend kam der Donaudampfschifffahrtsgesellschaftskapitän nach Hause, müde, aber zufrieden mit sich.",
    "Chinese": "他们很晚才到达村庄，窗户里已经没有灯光了。他们敲了敲第一扇门，等了很久，没有人来开门。",
    "Japanese": "夜遅く村に着いたとき、どの窓にもあかりはなかった。最初の戸をたたいたが、だれも出てこなかった。",
    "Thai": "เมื่อพวกเขามาถึงหมู่บ้านก็ดึกแล้ว และไม่มีหน้าต่างบานใดเปิดไฟอยู่เลย",
    "Arabic": "وصلوا إلى القرية في وقت متأخر من الليل ولم يكن هناك ضوء في أي نافذة.",
    "Hindi": "जब वे गाँव पहुँचे तब बहुत देर हो चुकी थी और किसी खिड़की में रोशनी नहीं थी।",
    "Python": "def area(radius):\n    \"\"\"Of a circle.\"\"\"\n    return 3.14159 * radius ** 2\n\n\nprint(area(2.5))\n",
}
BAD = {
    "min_characters": "Too short.",
    "max_characters": ENGLISH * 20,
    "min_letters": "1 + 1 = 2, 2 + 2 = 4; 33 - 3 = 30 (a) [b] {c} 12 13 14 15",
    "max_digits": "one two three four " + "1234567890 " * 6 + "five six seven eight nine ten",
    "max_signs": "a !? b $% c &/ d () e == f ?? g +* h ## i ,; j .: k -_ l <> and so on ever after",
    "min_word_length": "(((())))    " * 8,
    "max_word_length": "averyveryverylongstringofletters/" * 4,
    "min_unique_words": "spam egg " * 30,
    "max_repeated_signs": "Contents " + "." * 8 + " seven, " + "Preface " + "." * 14 + " nine and so on and on",
    "max_repeated_lines": "The same line again and again\n" * 3 + "another one\n",
}


# ---- measures ----


@pytest.mark.parametrize("text", [*GOOD.values(), *BAD.values(), "", " \n\t", "😀" * 9, "\ud800", "x" * 5000 + " y " * 3000])
def test_measures_are_those_of_a_loop_over_characters(text):
    visible = [c for c in text if not (c in "\t\n\x0b\x0c\r" or unicodedata.category(c)[0] == "Z")]
    found = measures(text)

    def share(categories):
        return sum(unicodedata.category(c)[0] in categories for c in visible) / max(1, len(visible))

    all_words = WORD.findall(text)
    first = [word.lower() for word in all_words[:1000]]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    again = sum(len(line) for i, line in enumerate(lines) if line in lines[:i])
    expected = {
        "characters": len(text),
        "letters": share("LM"),
        "digits": share("N"),
        "signs": share("PS"),
        "word_length": sum(map(len, all_words)) / max(1, len(all_words)),
        "unique_words": len(set(first)) / max(1, len(first)),
        "repeated_signs": sum(text[i - 3 : i + 1] == c * 4 and not c.isspace() for i, c in enumerate(text) if i >= 3) / max(1, len(visible)),
        "repeated_lines": again / max(1, sum(map(len, lines))),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_the_table_of_kinds():
    table = kinds()
    assert all(table[ord(c)] == SPACE for c in " \t\n\r\u00a0\u3000") and all(table[ord(c)] == UNSPACED for c in "村あンไ")
    assert len(table) == 0x110000 and table[ord("é")] == table[ord("я")] == 0


# ---- limits ----


@pytest.mark.parametrize("language", GOOD)
def test_ordinary_text_of_any_language_is_kept_as_it_is(language):
    document = Document(GOOD[language], "here")
    assert Cleaner(PLAIN).clean(document) == document


@pytest.mark.parametrize("rule", BAD)
def test_each_limit_drops_and_says_so(rule):
    config = CleanConfig(boilerplate=0, max_characters=1000, min_letters=0.2 if rule == "max_digits" else 0 if rule != "min_letters" else 0.4)
    config = config if rule != "min_word_length" else CleanConfig(boilerplate=0, min_letters=0, max_signs=1, max_repeated_signs=1)
    outcomes, tallies = clean([Document(ENGLISH, "good"), Document(BAD[rule], "bad")], config)
    good, bad = outcomes
    assert isinstance(good, Document) and isinstance(bad, Dropped) and bad.rule == rule
    tally = tallies[rule]
    assert (tally.documents, tally.characters) == (1, len(BAD[rule])) and tally.examples[0]["source"] == "bad"
    assert tally.examples[0]["found"] == pytest.approx(bad.found, abs=1e-4) and BAD[rule].startswith(tally.examples[0]["text"].rstrip("…"))
    assert sum(t.documents for t in tallies.values()) == 1


def test_every_limit_is_tested_and_has_a_measure():
    limits = [name for name in Cleaner(PLAIN).tallies if name.startswith(("min_", "max_"))]
    assert set(limits) == set(BAD) and {name[4:] for name in limits} == set(measures("a"))


def test_a_bound_itself_is_within_the_limit():
    assert broken_limit("a" * 30 + " b c d", CleanConfig(boilerplate=0, min_characters=36, max_characters=36, max_word_length=33 / 4, max_repeated_signs=1)) is None


# ---- edits ----


@pytest.mark.parametrize(
    "edit, before, after, places",
    [
        (to_nfc, "Cafe\u0301", "Café", 1),
        (to_nfc, "Café", "Café", 0),
        (without_control, "a\r\nb\rc\n\td\x00\x07\x7f\x85\u200b\ufeff\u00ade", "a\nb\nc\n\tde", 9),
        (without_control, "👩\u200d💻 نامه\u200cها", "👩\u200d💻 نامه\u200cها", 0),
        (mask_email, "Write to jane.doe+x@mail.example.co.uk, or a_b@c.org.", "Write to [email], or [email].", 2),
        (mask_email, "an @decorator, a @ b, me@home, x@1.2, ü@bücher.de", "an @decorator, a @ b, me@home, x@1.2, [email]", 1),
        (mask_phone, "Call +44 20 7946 0018 or (020) 7946 0018, 202-555-0143.", "Call [phone] or [phone], [phone].", 3),
        (mask_phone, "2024-01-15, 12.30.45, 1 + 234567 = 3, +35236450.6, 3.14159265", "2024-01-15, 12.30.45, 1 + 234567 = 3, +35236450.6, 3.14159265", 0),
        (mask_ip, "from 192.168.0.1, 2001:db8::ff00:42:8329 and ::1.", "from [ip], [ip] and [ip].", 3),
        (mask_ip, "300.1.1.1, 12:30:45, std::vector, a::b, 1.2.3, 1.2.3.4.5, x:1", "300.1.1.1, 12:30:45, std::vector, a::b, 1.2.3, 1.2.3.4.5, x:1", 0),
    ],
)
def test_edits(edit, before, after, places):
    assert edit(before) == (after, places) and edit(after) == (after, 0)


@pytest.mark.parametrize("text", ["a" * 200_000 + "@", "a.@" * 60_000, "+1" * 60_000, "1." * 60_000, "(12" * 60_000, ":1" * 60_000, "1:" * 60_000])
def test_no_text_makes_a_pattern_slow(text):
    for name in ("email", "phone", "ip"):
        EDITS[name](text)  # a pattern that goes back again and again would take minutes


def test_edits_come_before_limits_and_can_be_left_out():
    text = "Cafe\u0301 x@example.org\r\n" + ENGLISH
    assert Cleaner(PLAIN).clean(Document(text, "a")).text == "Café [email]\n" + ENGLISH
    off = CleanConfig(boilerplate=0, unicode=False, control=False, email=False)
    assert Cleaner(off).clean(Document(text, "a")).text == text and "email" not in Cleaner(off).tallies
    dropped = Cleaner(PLAIN).clean(Document("\u200b" * 40 + "short", "a"))
    assert dropped.rule == "min_characters" and dropped.found == 5


def test_examples_show_the_place_of_a_change_and_are_as_many_as_wanted():
    documents = [Document(f"{ENGLISH * 5} me{i}@example.org {ENGLISH}", f"d{i}") for i in range(4)]
    outcomes, tallies = clean(documents, CleanConfig(boilerplate=0, examples=2))
    assert len(list(outcomes)) == 4 and tallies["email"].documents == tallies["email"].places == 4
    assert [e["source"] for e in tallies["email"].examples] == ["d0", "d1"]
    assert "me0@example.org" in tallies["email"].examples[0]["before"] and "[email]" in tallies["email"].examples[0]["after"]
    assert tallies["email"].characters == 4 * (len("me0@example.org") - len("[email]"))


# ---- boilerplate ----


def test_lines_of_many_documents_are_removed_and_those_of_few_stay():
    menu, rare = "Home | Products | About us | Contact", "This line stands in two documents."
    documents = [Document(f"{menu}\n}}\n{ENGLISH} {i}\n{rare if i < 2 else ''}\n  {menu}\r", f"d{i}") for i in range(5)]
    outcomes, tallies = clean(documents, CleanConfig(boilerplate=5, control=False))
    for i, outcome in enumerate(outcomes):
        assert outcome.text == f"}}\n{ENGLISH} {i}\n{rare if i < 2 else ''}"
    assert (tallies["boilerplate"].documents, tallies["boilerplate"].places) == (5, 10)
    outcomes, _ = clean(documents, CleanConfig(boilerplate=6, control=False))
    assert [o.text for o in outcomes] == [d.text for d in documents]
    with pytest.raises(ValueError, match="read twice"):
        clean(iter(documents), CleanConfig())
    with pytest.raises(ValueError, match="needs the LineCounts"):
        Cleaner(CleanConfig())


def test_line_counts_are_those_of_a_dictionary():
    rng = random.Random(0)
    lines = [f"A line that stands in some of them, number {i}" for i in range(300)]
    counts, naive = LineCounts(), collections.Counter()
    for _ in range(100):
        document = rng.choices(lines, k=30)
        counts.add("\n".join(document))
        naive.update(set(document))
    assert counts(lines).tolist() == [naive[line] for line in lines]


def test_a_full_table_counts_too_much_and_never_too_little(monkeypatch):
    monkeypatch.setattr("tinyllm.data.lines.WIDTH", 64)
    counts = LineCounts()
    lines = [f"A line that stands in one of them, number {i}" for i in range(256)]
    for line in lines:
        counts.add(line)
    found = counts(lines)
    assert found.min() >= 1 and (found > 1 + 2 * 256 / 64).mean() < 2**-4  # of N lines too large by more than 2N/w: P ≤ 2⁻ᵈ


# ---- contamination ----


def test_contamination_is_that_of_the_definition():
    rng = random.Random(0)
    vocabulary = "a b c d e f".split()
    documents = [Document(" ".join(rng.choices(vocabulary, k=rng.randint(0, 60))), f"d{i}") for i in range(30)]
    benchmark = [Document(" ".join(rng.choices(vocabulary, k=rng.randint(0, 9))), f"b{i}") for i in range(60)]
    for n in (1, 4, 6):
        found = contamination(benchmark, iter(documents), n)
        assert [(o.ngrams, o.found) for o in found] == contamination_naive(benchmark, documents, n)
        for overlap in found:
            assert bool(overlap.found) == bool(overlap.example)
            if overlap.found:
                source = next(d for d in documents if d.source == overlap.source)
                assert overlap.example in source.text and overlap.example in overlap.item.text and len(overlap.example.split()) == n
                assert not any(overlap.example in d.text for d in documents[: documents.index(source)])


def test_a_leaked_question_is_found_whatever_its_case_and_punctuation():
    question = Document("Which planet is the largest of all those that move around the Sun?", "q1")
    other = Document("How many legs has a spider that has lost two of those it was born with?", "q2")
    text = f"{ENGLISH} -- WHICH planet is the “largest” of all those\nthat move, around the sun! {ENGLISH}"
    leaked, clear = contamination([question, other], [Document(ENGLISH, "a"), Document(text, "b")], 13)
    assert (leaked.share, leaked.source, clear.share) == (1.0, "b", 0.0)


def test_contamination_at_its_edges():
    item = Document("three words only", "q")
    assert contamination([item], [item], 4)[0].ngrams == 0 and contamination([item], [item], 4)[0].share == 0
    assert contamination([item], [], 2)[0].found == 0 and contamination([], [item], 2) == []
    assert contamination([Document("他们很晚才到达村庄", "q")], [Document("昨天他们很晚才到达村庄", "d")], 5)[0].share == 1
    assert words("Don't 3.5 他们x") == ["don", "t", "3", "5", "他", "们", "x"]
    with pytest.raises(ValueError, match="at least one word"):
        contamination([item], [item], 0)
    assert np.isclose(contamination([Document("a b c d", "q")], [Document("a b x c d", "d")], 2)[0].share, 2 / 3)
