"""Namespaces with figures of their own: the live ones, whatever came before, and no counter ever falls."""

from collections import Counter

from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Answer, Namespace
from kvkeep.observe.labels import MEMORY, MOST_LABELS, Labels
from kvkeep.terms import GroupSpec
from tests.observe.traffic import keys_of

PAGE = 4096


class Scene:
    """A keeper, and what a scraper has seen of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.keeper = Keeper(256 * PAGE, "lru")
        self.keeper.attach("s")
        self.labels = Labels(self.keeper, lambda: self.now)
        self.last: dict[str, Counter] = {}

    def reset(self) -> Namespace:
        """Another namespace of the same model, and a request that asks there."""
        number = len(self.keeper.namespaces)
        space = self.keeper.open_namespace(number.to_bytes(32, "little"), "m", [GroupSpec(PAGE, None)], 1, 1)
        self.ask(space)
        return space

    def ask(self, space: Namespace) -> None:
        self.keeper.lookup("s", space, keys_of(1, 3))
        self.keeper.answered(space, b"", Answer(1, 3, 2, Counter({0: 1})))

    def save(self, space: Namespace) -> None:
        done = self.keeper.reserve("s", space, keys_of(1, 3), [[True] * 3], 0, 0)
        self.keeper.commit("s", done.reservation, 0)

    def scrape(self) -> dict[str, Counter]:
        rows = {row.name: row.figures for row in self.labels.rows()}
        assert len(rows) <= MOST_LABELS + 1
        for name in rows.keys() & self.last.keys():
            assert all(rows[name][what] >= count for what, count in self.last[name].items()), name
        self.last = rows
        return rows


def name(space: Namespace) -> str:
    return f"{space.fingerprint.hex()[:8]} m"


def test_the_live_namespace_has_a_label_after_any_number_of_resets() -> None:
    scene = Scene()
    for _ in range(100):
        space = scene.reset()
        scene.now += 120
        rows = scene.scrape()
        scene.ask(space)
        rows = scene.scrape()
        assert rows[name(space)]["asked_chunks"] == 6
        assert (rows[name(space)][MEMORY], rows[name(space)][0], rows[name(space)]["missed_chunks"]) == (
            2,
            2,
            2,
        )
    assert "others" in rows
    assert rows["others"]["asked_chunks"] == 0


def test_what_holds_something_or_was_asked_lately_keeps_its_label() -> None:
    scene = Scene()
    spaces = [scene.reset() for _ in range(MOST_LABELS)]
    scene.save(spaces[3])
    scene.scrape()
    late = scene.reset()
    assert name(late) not in scene.scrape()
    assert scene.last["others"]["asked_chunks"] == 3
    scene.now += 500
    for space in spaces[5:]:
        scene.ask(space)
    assert name(late) not in scene.scrape(), "it was asked lately"
    scene.now += 200
    scene.save(late)  # older than the last scrape: what it asked before stays with the others
    scene.ask(late)
    rows = scene.scrape()
    assert rows[name(late)]["asked_chunks"] == 0, "counted with the others until now"
    assert rows["others"]["asked_chunks"] == 6
    scene.ask(late)
    assert scene.scrape()[name(late)]["asked_chunks"] == 3
    assert name(spaces[3]) in rows
    assert all(name(space) in rows for space in spaces[5:])
    newer = scene.reset()
    rows = scene.scrape()
    assert rows[name(newer)]["asked_chunks"] == 3, "never counted elsewhere"
