"""Retrieval returns what was planted; BM25 is its formula."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from scipy import stats

from featcl.errors import FeatclError
from featcl.lab.tasks import make_task
from featcl.lab.world import make_world
from featcl.methods.bm25 import Bm25, words
from featcl.methods.embeddings import late_interaction, token_vectors
from featcl.methods.retrieval import Retrieval
from featcl.models import load_model
from featcl.objectives.experience import Student
from featcl.objectives.scoring import Scorer
from featcl.streams import Chat, Trajectory
from tests.methods.replaying import Bench, ask, resumes
from tests.methods.test_in_context import system_of

THINGS = ("lamp", "chair", "stove", "clock", "bed")
HAY = [Trajectory(f"hay{number}", text=f"the {thing} is in room {number}") for number, thing in enumerate(THINGS)]
NEEDLE = Trajectory("needle", text="marmots hibernate below the glacier")
ASKED = [{"role": "user", "content": "where do marmots hibernate?"}]


needs_bm25 = pytest.mark.skipif(find_spec("bm25s") is None, reason="BM25 comes from bm25s, which is not installed")


def filled(method: Retrieval, bench: Any, *trajectories: Trajectory) -> Retrieval:
    for trajectory in trajectories:
        bench.observe(trajectory, method)
    return method


# --- BM25 --------------------------------------------------------------------------------------------------------


def by_hand(query: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    found = [words(text) for text in texts]
    mean = sum(map(len, found)) / len(found)
    scores = []
    for text in found:
        score = 0.0
        for word in words(query):
            n, tf = sum(word in other for other in found), text.count(word)
            idf = math.log(1 + (len(found) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@needs_bm25
def test_bm25_is_its_formula() -> None:
    texts = ["the cat sat on the mat", "the dog sat", "a cat and a cat and a dog", "", "snake_case(cat) == 42"]
    for query in ("cat", "the cat", "DOG dog", "42 snake", "nothing of this", ""):
        assert Bm25(texts).scores(query) == pytest.approx(by_hand(query, texts), rel=1e-5)
    assert Bm25(texts, k1=0.9, b=0.4).scores("cat") == pytest.approx(by_hand("cat", texts, 0.9, 0.4), rel=1e-5)
    assert Bm25([]).scores("cat") == []
    assert Bm25(["", " "]).scores("cat") == [0.0, 0.0]


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(FeatclError, match=r"pip install featcl\[retrieval\]"):
        Retrieval()
    assert Retrieval(by="embedding").by == "embedding"


# --- the planted item --------------------------------------------------------------------------------------------


@needs_bm25
@pytest.mark.parametrize("place", [0, 3, 5])
def test_bm25_returns_the_planted_item(place: int) -> None:
    bench, method = Bench(), Retrieval(k=1)
    filled(method, bench, *HAY[:place], NEEDLE, *HAY[place:])
    assert system_of(method.context(ASKED, bench.view())) == NEEDLE.text
    other = [{"role": "user", "content": "where is the stove?"}]
    assert system_of(method.context(other, bench.view())) == HAY[2].text  # negative control: another question
    stranger = [{"role": "user", "content": "qwerty"}]
    assert method.context(stranger, bench.view()) is stranger  # no word in common: nothing in front


def test_embeddings_of_a_trained_model_find_the_note_far_more_often_than_chance() -> None:
    """The laboratory's model: questions and the notes that answer them share a name at most."""
    model, tokenizer = load_model("lab/olmo2")

    class Absent:  # an adapter that is not there
        def __init__(self) -> None:
            self.model = model

        def disabled(self) -> Any:
            return torch.no_grad()

        def parameters(self) -> list[Any]:
            return []

    student = Student(Scorer(model), Absent(), Chat(tokenizer), 512)
    world = make_world("development")
    items = [
        item for name in ("home_facts", "code_library", "home_style") for item in make_task(name, world).items[:16]
    ]
    notes = sorted({item.context or "" for item in items})
    vectors = [token_vectors(note, student, layer=1) for note in notes]
    found = torch.stack([
        late_interaction(token_vectors(item.messages[-1]["content"], student, layer=1), vectors).topk(4).indices
        for item in items
    ])  # fmt: skip
    right = torch.tensor([notes.index(item.context or "") for item in items])
    hits, shifted = (int((found == target[:, None]).any(1).sum()) for target in (right, right.roll(16)))
    chance = 4 / len(notes)
    assert stats.binomtest(hits, len(items), chance, alternative="greater").pvalue < 1e-6
    assert stats.binomtest(shifted, len(items), chance, alternative="greater").pvalue > 0.05  # negative control


def test_embeddings_find_the_very_text_and_do_not_move_with_the_weights() -> None:
    bench, method = Bench(), Retrieval(by="embedding", k=1)
    filled(method, bench, *HAY, NEEDLE)
    bench.move_()
    for trajectory in (*HAY, NEEDLE):
        same = [{"role": "user", "content": trajectory.text}]
        assert system_of(method.context(same, bench.view())) == trajectory.text


def test_late_interaction_by_hand() -> None:
    common = torch.tensor([100.0, 0.0, 0.0])
    first = common + torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    second = common + torch.tensor([[0.0, -2.0, 0.0], [0.0, 0.0, -3.0]])
    query = common + torch.tensor([[0.0, 5.0, 0.0], [0.0, 3.0, 4.0]])  # towards the first's tokens: 1, and 0.8
    assert late_interaction(query, [first, second]).tolist() == pytest.approx([0.9, -0.3], abs=1e-4)
    plain = torch.cosine_similarity(query[:, None], torch.cat([first, second]), dim=-1)
    assert float(plain.min()) > 0.99  # negative control: without the mean all look alike


# --- the method --------------------------------------------------------------------------------------------------


@needs_bm25
def test_the_best_stands_next_to_the_question() -> None:
    bench, method = Bench(), Retrieval(k=3)
    filled(method, bench, *HAY, NEEDLE)
    asked = [{"role": "user", "content": "do marmots sleep in room 3?"}]
    shown = system_of(method.context(asked, bench.view())).split("\n")
    scores = Bm25([t.text or "" for t in (*HAY, NEEDLE)]).scores("do marmots sleep in room 3?")
    best = sorted(range(6), key=lambda place: scores[place])[-3:]
    assert shown == [(*HAY, NEEDLE)[place].text for place in best]
    assert shown[-1] in (HAY[3].text, NEEDLE.text)


@pytest.mark.parametrize("by", [pytest.param("bm25", marks=needs_bm25), "embedding"])
def test_retrieval_resumes_to_the_same_bits(by: str) -> None:
    make = lambda: Retrieval(by=by, k=2, frozen=False, budget_bytes=9000)  # noqa: E731
    assert resumes(make, [ask(n) for n in range(7)], cut=4)


def test_the_budget_holds_the_vectors_also() -> None:
    bench = Bench()
    method = filled(Retrieval(by="embedding", budget_bytes=5000), bench, *HAY, NEEDLE)
    held = sum(len(each.text.encode()) for each in method.texts.kept) + sum(t.nbytes for t in method.tensors().values())
    assert method.cost().stored_bytes == held <= 5000
    assert 0 < len(method.texts.kept) < 6
    assert set(method.tensors()) == {str(each.number) for each in method.texts.kept}


@needs_bm25
def test_bad_settings_are_refused() -> None:
    for given, message in (({"by": "bm52"}, "by 'bm52'"), ({"k": 0}, "k must be"), ({"budget_bytes": 0}, "must be")):
        with pytest.raises(FeatclError, match=message):
            Retrieval(**given)  # type: ignore[arg-type]
