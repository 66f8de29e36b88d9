"""tinyworld: probabilities that add up to one, entropies that are exact, examinations that nobody has seen before."""
import json
import re
from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest

from tinyllm.data import read_documents
from tinyllm.data.tinyworld import (
    MIX,
    Draw,
    Item,
    World,
    best_masked_accuracy,
    best_next_sentence_accuracy,
    derivations,
    final_answer,
    nats_per_token,
    save_records,
    surprise,
)
from tinyllm.data.tinyworld.draw import exact_entropy
from tinyllm.data.tinyworld.facts import SUBJECTS
from tinyllm.tokenizer import CharTokenizer, train_bpe

KINDS = (*MIX, "dialogue")
WORLD = World(0)


@pytest.fixture(scope="module")
def stream():
    """Everything that a model may be trained on, as text."""
    items = [item for kind in KINDS for item in WORLD.documents(kind, 1500)]
    return items, list(WORLD.preferences(1500))


# ---- chance ----

def coin_and_die(draw):
    if draw.branch({"coin": 0.25, "die": 0.75}) == "coin":
        return draw.one_of("HT")
    return draw.distinct("123", 2)


def test_derivations_are_all_there_are_with_their_probabilities():
    found = [("".join(made), probability) for made, probability in derivations(coin_and_die)]
    expected = {"H": 1 / 8, "T": 1 / 8} | dict.fromkeys(("12", "13", "21", "23", "31", "32"), 1 / 8)
    assert len(found) == 8 and dict(found) == pytest.approx(expected)
    assert exact_entropy(coin_and_die) == pytest.approx(log(8))
    assert list(derivations(lambda draw: "always")) == [("always", 1.0)]


def test_draws_are_as_frequent_as_their_probabilities_say():
    random, counts, nats = np.random.default_rng(0), Counter(), {}
    for _ in range(4000):
        draw = Draw(random)
        made = "".join(coin_and_die(draw))
        counts[made] += 1
        nats[made] = -draw.log_probability
    assert nats == pytest.approx(dict.fromkeys(nats, log(8)))
    assert len(counts) == 8 and max(abs(count - 500) for count in counts.values()) < 4 * sqrt(4000 / 8 * 7 / 8)


# ---- the grammar ----

@pytest.mark.parametrize("kind", ["fact", "quiz", "sum"])
def test_each_text_has_one_derivation(kind):
    """Listed completely: no text twice, probabilities add up to 1, and the closed form is the entropy."""
    listed = [(item.text, p) for item, p in derivations(World(1, size=3, digits=1 if kind == "sum" else 2).generator(kind))]
    check_listed(World(1, size=3, digits=1), kind, listed)


@pytest.mark.slow
@pytest.mark.parametrize("kind, size, digits", [("story", 2, 1), ("note", 3, 1), ("sum", 2, 2), ("dialogue", 2, 1), ("mix", 2, 1)])
def test_each_text_has_one_derivation_of_long_ones(kind, size, digits, monkeypatch):
    """One move and one question a story keep the list short; what is asked and how is listed all the same."""
    monkeypatch.setattr("tinyllm.data.tinyworld.story.MOVES", {1: 0.6, 2: 0.4} if kind == "story" else {1: 1.0})
    if kind != "story":
        monkeypatch.setattr("tinyllm.data.tinyworld.world.STORY_QUESTIONS", 1)
    if kind == "dialogue":
        short = {("fact",): 0.3, ("story",): 0.25, ("sum",): 0.2, ("fact", "fact"): 0.25}
        monkeypatch.setattr("tinyllm.data.tinyworld.world.TOPICS", short)
    world = World(1, size, digits)
    check_listed(world, kind, [(item.text, p) for item, p in derivations(world.generator(kind))])


def check_listed(world, kind, listed):
    texts = [text for text, _ in listed]
    assert len(set(texts)) == len(texts) > 10
    assert sum(p for _, p in listed) == pytest.approx(1, abs=1e-9)
    assert world.entropy(kind) == pytest.approx(-sum(p * log(p) for _, p in listed), rel=1e-9)


@pytest.mark.parametrize("kind", [*KINDS, "mix"])
def test_the_closed_form_is_the_mean_of_minus_log_p(kind):
    found = surprise(list(WORLD.documents(kind, 1000, seed=3, split="all")))
    assert found.count == 1000 and abs(found.nats - WORLD.entropy(kind)) <= 4 * found.standard_error + 1e-9


def test_the_entropy_of_a_mix_is_that_of_its_choice_and_of_its_parts():
    expected = sum(p * (WORLD.entropy(kind) - log(p)) for kind, p in MIX.items())
    assert WORLD.entropy("mix") == pytest.approx(expected) and sum(MIX.values()) == pytest.approx(1)


def test_entropies_by_hand():
    assert WORLD.entropy("sum") == pytest.approx(2 * log(90))
    assert WORLD.entropy("fact") == pytest.approx(log(32) + log(6) + 3 * log(2))
    assert WORLD.entropy("quiz") == pytest.approx(log(96) + log(2))
    who_and_what = 3 * log(8) + 2 * log(6) + log(4)
    moves = 1.4 * log(5 * 2) - 0.6 * log(0.6) - 0.4 * log(0.4) + 0.4 * log(2)
    assert WORLD.entropy("story") == pytest.approx(who_and_what + moves + log(4 * 3 * 2))


def test_what_is_thrown_away_costs_nothing():
    """ln p is that of the whole world, whichever part the text is of: equal for all sums of one style, and for all notes."""
    for kind in ("sum", "note"):
        for split in ("train", "test"):
            found = [-item.log_probability for item in WORLD.documents(kind, 60, split=split)]
            assert found == pytest.approx([WORLD.entropy(kind)] * 60)


# ---- what it says is right ----

def test_sums_and_their_steps_are_right():
    for item in WORLD.documents("sum", 300):
        for left, right in re.findall(r"((?:\d )+\+ [\d +]*)= (\d(?: \d)*)", item.text):
            assert sum(int(n) for n in left.split("+")) == int(right.replace(" ", "")), item.text
        a, b = re.search(r"What is ([\d ]+) \+ ([\d ]+)\?", item.text).groups()
        assert int(a.replace(" ", "")) + int(b.replace(" ", "")) == int(item.answer.replace(" ", ""))
        assert item.text.endswith(f" {item.answer}.")


def test_carries_are_seen():
    texts = {item.text for item in World(0, digits=3).documents("sum", 3000)}
    assert any("= 1 2. 9 + 9 + 1 = 1 9." in text or re.search(r"\+ 1 = 1 \d\. The sum is 1 \d \d \d\.", text) for text in texts)


def follow(story):
    """The facts of a story, read by its sentences alone."""
    where, who, colour, met = {}, {}, {}, dict(re.findall(r"(\w+) met the (\w+)\.", story.partition("?")[0]))
    for person, shade, thing, room in re.findall(r"(\w+) found a (\w+) (\w+) in the (\w+)\.", story):
        where[thing], who[thing], colour[thing] = room, person, shade
    for person, thing, before, room in re.findall(r"(\w+) took the (\w+) from the (\w+) to the (\w+)\.", story):
        assert who[thing] == person and where[thing] == before != room
        where[thing] = room
    return where, who, colour, met


def test_stories_are_answered_rightly():
    for item in WORLD.documents("story", 200):
        where, who, colour, met = follow(item.text)
        asked = re.findall(r"((?:Where|Whom|Who|What) [^.]*?\?) (.*?\.)", item.text)
        assert len(set(asked)) == len(asked) == 3
        for question, reply in asked:
            about = re.search(r"(?:the|did) (\w+)", question)[1]
            table = {"Where": where, "Who": who, "What": colour, "Whom": met}[question.split()[0]]
            assert final_answer(reply) == table[about]


def test_facts_agree_wherever_they_are_told():
    told = {}
    for item in [*WORLD.documents("fact", 600), *WORLD.documents("quiz", 600)]:
        for sentence in re.sub(r"^[^.]*\? ", "", item.text).split(". "):
            subject, value = sentence.rstrip(".").rsplit(" ", 1)
            assert told.setdefault(subject, value) == value
    assert len(told) == 2 * 4 * 8 * 3
    assert [fact.value for fact in World(1).facts] != [fact.value for fact in WORLD.facts]


# ---- examinations ----

def test_examinations_are_not_in_the_training_stream(stream):
    items, preferences = stream
    everything = "\n".join([item.text for item in items] + [pair.prompt[0]["content"] for pair in preferences])
    for subject in SUBJECTS:
        for item in WORLD.questions(subject):
            assert item.messages[0]["content"] not in everything
            assert item.messages[-1]["content"] in everything  # the fact itself is told
    seen = {part for item in items for part in item.key.split(" | ")} | {pair.key for pair in preferences}
    for subject in ("stories", "sums"):
        keys = {item.key for item in WORLD.questions(subject, 100)}
        assert len(keys) == 100 and not keys & seen and all(map(WORLD.held_out, keys))


def test_held_out_is_held_out_in_every_kind(stream):
    items, preferences = stream
    for key in {part for item in items for part in item.key.split(" | ")} | {pair.key for pair in preferences}:
        assert not key or not WORLD.held_out(key)
    for kind in ("story", "sum", "note"):
        assert all(WORLD.held_out(item.key) for item in WORLD.documents(kind, 50, split="test"))
    share = np.mean([WORLD.held_out(item.key) for item in WORLD.documents("story", 2000, split="all")])
    assert abs(share - 0.1) < 4 * sqrt(0.09 / 2000)
    turned = {f"{b} + {a}" for a, b in (pair.key.split(" + ") for pair in WORLD.questions("sums", 50)) if a != b}
    assert not turned & {item.key for item in items}, "a sum is held out both ways round"


def test_test_pairs_ask_what_training_pairs_do_not():
    asked = {pair.prompt[0]["content"] for pair in WORLD.preferences(1000)}
    assert not asked & {pair.prompt[0]["content"] for pair in WORLD.preferences(300, split="test")}


def test_choice_questions_have_one_right_answer():
    truth = {fact.statement() for fact in WORLD.facts}
    right = Counter()
    for subject in SUBJECTS:
        questions = WORLD.questions(subject)
        assert len(questions) == 24 and len({q.text for q in questions}) == 24
        for item in questions:
            assert len(set(item.choices)) == 4 and [choice in truth for choice in item.choices].count(True) == 1
            assert item.choices[item.right] in truth and final_answer(item.choices[item.right]) == item.answer
            right[item.right] += 1
    assert set(right) == {0, 1, 2, 3} and max(right.values()) < 45, "no place is right much more often than others"


def test_free_questions_end_in_their_answer():
    for subject in ("stories", "sums"):
        for item in WORLD.questions(subject, 60):
            assert final_answer(item.messages[-1]["content"]) == item.answer and item.text == item.messages[0]["content"]
    assert {subject: len(items) for subject, items in WORLD.suite(20).items()} == dict.fromkeys(SUBJECTS, 24) | {"stories": 20, "sums": 20}


@pytest.mark.parametrize("reply, answer", [
    ("The sum is 1 3 5.", "1 3 5"), ("8 5.", "8 5"), ("7 + 8 = 1 5. 8 5", "8 5"), ("The ball is in the hall.", "hall"), ("hall", "hall"),
    ("Anna!?", "Anna"), ("", ""), ("...", ""), ("12", "12"), ("Das Öl", "Öl"),
])  # fmt: skip
def test_final_answer(reply, answer):
    assert final_answer(reply) == answer


def test_preferred_is_right_and_in_full():
    truth = {fact.statement() for fact in WORLD.facts}
    faults = Counter()
    for pair in WORLD.preferences(400):
        faults[pair.fault] += 1
        assert pair.chosen != pair.rejected
        if not pair.key:
            assert pair.chosen in truth and pair.rejected not in truth
        if pair.fault == "curt":
            assert final_answer(pair.rejected) == final_answer(pair.chosen) and len(pair.rejected) < len(pair.chosen)
        else:
            assert final_answer(pair.rejected) != final_answer(pair.chosen)
            assert pair.rejected.rsplit(" ", 1)[0] == pair.chosen.rsplit(" ", 1)[0]
    assert 140 < faults["curt"] < 260


def test_notes_have_labels_that_their_words_do_not_give_away():
    notes = list(WORLD.classification(600))
    words = {label: {word for note in notes if note.answer == label for word in re.findall(r"\w+|[.!]", note.text)} for label in ("ham", "spam")}
    assert 240 < sum(note.answer == "spam" for note in notes) < 360
    assert {"free", "coins", "send", "today", "win"} & words["ham"] >= {"free", "coins", "send", "today"} <= words["spam"]


# ---- form ----

def test_dialogues_alternate_and_their_system_message_is_heeded():
    kinds = Counter()
    for item in WORLD.documents("dialogue", 500):
        roles = [message["role"] for message in item.messages]
        kinds[len(roles)] += 1
        system = roles[0] == "system"
        assert roles[system:] == ["user", "assistant"] * ((len(roles) - system) // 2)
        assert final_answer(item.messages[-1]["content"]) == item.answer
        if system:
            curt = {len(message["content"]) <= len(item.answer) + 6 and "The" not in message["content"]
                    for message in item.messages[-1:] if message["role"] == "assistant"}  # fmt: skip
            assert curt == {item.messages[0]["content"] == "Answer briefly."}
    assert {2, 3, 4, 5} <= set(kinds)


def test_the_same_seed_gives_the_same_and_more_begins_like_less():
    for kind in KINDS:
        some = list(World(5).documents(kind, 20, seed=2))
        assert some == list(World(5).documents(kind, 40, seed=2))[:20] != list(World(5).documents(kind, 20, seed=3))
    assert list(WORLD.preferences(10)) == list(WORLD.preferences(20))[:10]
    assert WORLD.suite(10) == World(0).suite(10) and WORLD.questions("sums", 5) == WORLD.questions("sums", 10)[:5]


def test_records_on_disk(tmp_path):
    path = tmp_path / "world.jsonl"
    items = list(WORLD.documents("mix", 30))
    assert save_records(path, items) == 30
    assert [document.text for document in read_documents([path])] == [item.text for item in items]
    assert save_records(path, [next(WORLD.documents("dialogue", 1)), *WORLD.preferences(1), *WORLD.classification(1)]) == 3
    dialogue, pair, note = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert {*dialogue} == {"messages"} and {*pair} == {"prompt", "chosen", "rejected"} and note["label"] in ("ham", "spam")
    assert save_records(path, []) == 0 and path.read_bytes() == b""


def test_sentences_of_a_description_name_what_they_belong_to():
    for item in WORLD.documents("fact", 50):
        sentences = item.sentences()
        assert len(sentences) == 3 and " ".join(sentences) == item.text
        assert len({re.sub(r"\W", " ", s).strip() for s in sentences}) == 3


# ---- how good a model can be ----

def test_nats_per_token():
    items = [Item("sum", "ab", log_probability=-3.0), Item("sum", "abc", log_probability=-2.0)]
    assert nats_per_token(items, CharTokenizer("abc")) == pytest.approx(5 / 5)
    assert nats_per_token(items, train_bpe(["zz"], 256 + 1)) == pytest.approx(5 / 7)  # and an end of text each
    with pytest.raises(ValueError, match="no texts"):
        surprise([])


def listed_descriptions(world):
    listed = list(derivations(world.generator("fact")))
    tokenizer = CharTokenizer.train([item.text for item, _ in listed])
    ids = [tokenizer.encode(item.text) for item, _ in listed]
    texts = np.full((len(ids), max(map(len, ids))), -1)
    for row, text in zip(texts, ids, strict=True):
        row[: len(text)] = text
    return listed, texts, np.array([p for _, p in listed]), tokenizer.vocab_size


def test_best_next_sentence_accuracy_is_that_of_bayes_rule():
    world = World(2, size=3)
    true, random, sentences = Counter(), Counter(), Counter()
    listed = [(item.sentences(), p) for item, p in derivations(world.generator("fact"))]
    for parts, p in listed:
        for a, b in zip(parts, parts[1:], strict=False):
            true[a, b] += p / 2
        for part in parts:
            sentences[part] += p / 3
    firsts = Counter()
    for (a, _), p in true.items():
        firsts[a] += p
    for a, p in firsts.items():
        for b, q in sentences.items():
            random[a, b] = p * q
    best = sum(max(true[pair], random[pair]) for pair in random) / 2
    assert best_next_sentence_accuracy(world) == pytest.approx(best)
    assert best_next_sentence_accuracy(WORLD) > 0.98


def test_best_masked_accuracy_by_hand():
    """Two texts "ab" (3/4) and "cb": the second place is always known, the first by its prior unless it is seen."""
    texts, prior, mask = np.array([[0, 1], [2, 1]]), np.array([0.75, 0.25]), 3
    args = dict(mask_id=mask, vocab_size=4)
    assert best_masked_accuracy(texts, prior, np.array([[mask, 1]]), np.array([[0, -1]]), **args) == 1
    assert best_masked_accuracy(texts, prior, np.array([[mask, 1]]), np.array([[2, -1]]), **args) == 0
    assert best_masked_accuracy(texts, prior, np.array([[2, mask]]), np.array([[2, 1]]), **args) == 1
    assert best_masked_accuracy(texts, prior, np.array([[1, mask]]), np.array([[2, 1]]), **args) == 0.5  # a stranger: the prior decides
    rare = np.array([0.1, 0.9])  # 0 is seen, but is asked for, so it may be a random one: 0.1 (0.1/4 + 0.1) < 0.9 · 0.1/4
    assert best_masked_accuracy(texts, rare, np.array([[0, 1]]), np.array([[2, -1]]), **args) == 1


def test_best_masked_accuracy_is_beaten_by_no_guess():
    """On descriptions, against always guessing what fits the visible text best without Bayes' rule for the noise."""
    world = World(3, size=2)
    _, texts, prior, size = listed_descriptions(world)
    random = np.random.default_rng(0)
    clean = texts[random.choice(len(texts), 60, p=prior)]
    chosen = (random.random(clean.shape) < 0.15) & (clean != -1)
    kind = random.random(clean.shape)
    ids = np.where(chosen & (kind < 0.8), size, np.where(chosen & (kind < 0.9), random.integers(size, size=clean.shape), clean))
    best = best_masked_accuracy(texts, prior, ids, np.where(chosen, clean, -1), mask_id=size, vocab_size=size + 1)
    right = total = 0
    for x, target, places in zip(ids, clean, chosen, strict=True):
        nearest = texts[((texts == x).sum(1) + (x == size).sum() + np.log(prior)).argmax()]
        right, total = right + (nearest == target)[places].sum(), total + places.sum()
    assert right / total - 0.02 <= best <= 1 and best > 0.9


# ---- bad input ----

@pytest.mark.parametrize("call, message", [
    (lambda: World(0, size=9), "2 to 8"), (lambda: World(0, digits=0), "at least 1 digit"),
    (lambda: next(WORLD.documents("poem", 1)), "kind of text 'poem' is unknown: use one of story, fact"),
    (lambda: next(WORLD.documents("fact", 1, split="val")), "split 'val' is unknown"),
    (lambda: WORLD.questions("history"), "subject 'history' is unknown"), (lambda: World(0, size=3).questions("animals"), "at least 4"),
    (lambda: next(WORLD.preferences(1, split="dev")), "split 'dev' is unknown"), (lambda: WORLD.entropy("x"), "kind of text 'x'"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_asked_for():
    assert list(WORLD.documents("mix", 0)) == [] and WORLD.questions("sums", 0) == [] and list(WORLD.preferences(0)) == []
    assert exp(next(WORLD.documents("quiz", 1)).log_probability) == pytest.approx(1 / 192)
