"""The checkpoints that a chat may choose: those that the server was started with, and those that lie in the
same folder of runs, which are loaded when somebody asks them.

    models = Models([engine], [pathlib.Path("out")], lambda path: Engine(path))
    list(models)                 ["reviews/sft", "reviews/best", "reviews/ppo", "feedback/round-1"]
    models["reviews/ppo"]        its engine
"""
import pathlib
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence

from runtime.run import read_config
from runtime.storage import checkpoint_path
from serve.engine import Engine, name_of

PLACES = ("*/*", "*/loop/round-*/ppo")  # of checkpoints, in a folder of runs
STAGES = ("sft", "best", "ppo")  # those that talk
MOST_LOADED = 3  # engines beside those of the start


class Models(MutableMapping[str, Engine]):
    """Engines by the names of their models. Any thread may ask."""

    def __init__(self, engines: Sequence[Engine], roots: Sequence[pathlib.Path], load: Callable[[str], Engine]):
        """engines: loaded, and never closed before the end. roots: folders like out/. load(path) -> engine."""
        self.first = {engine.name: engine for engine in engines}
        self.roots, self.load = list(roots), load
        self.loaded: dict[str, Engine] = {}  # in the order of their last use
        self.lock = threading.Lock()

    def found(self) -> dict[str, pathlib.Path]:
        """{name: folder} of the checkpoints on the disk, as they are now."""
        places = [(root, path) for root in self.roots for place in PLACES for path in sorted(root.glob(place))]
        return {self.name(root, path): path for root, path in places
                if path.name in STAGES and checkpoint_path(path).exists()
                and (read_config(path) or {"finished": True}).get("finished")}

    @staticmethod
    def name(root: pathlib.Path, path: pathlib.Path) -> str:
        """reviews/sft; of a loop's rounds reviews/loop/round-1, and of those that the page started the log's name."""
        if not path.parent.name.startswith("round-"):
            return name_of(str(path))
        return f"{root.stem if root.suffix == '.training' else path.parents[2].name + '/loop'}/{path.parent.name}"

    def names(self) -> dict[str, pathlib.Path | None]:
        return {**dict.fromkeys(self.first), **{name: path for name, path in self.found().items()
                                                if name not in self.first}}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Engine:
        """The engine; it is loaded if need be, and another one that has nothing to do is closed for it."""
        if name in self.first:
            return self.first[name]
        with self.lock:
            if name not in self.loaded:
                path = self.found()[name]
                for idle in [other for other, engine in self.loaded.items()
                             if not engine.batch.running and not engine.waiting][:len(self.loaded) + 1 - MOST_LOADED]:
                    self.loaded.pop(idle).close()
                self.loaded[name] = self.load(str(path))
            self.loaded[name] = self.loaded.pop(name)  # the last used
            return self.loaded[name]

    def __setitem__(self, name: str, engine: Engine) -> None:
        self.first[name] = engine

    def __delitem__(self, name: str) -> None:
        del self.first[name]

    def get(self, name: str, default: Engine | None = None) -> Engine | None:
        """The engine if it is loaded."""
        return self.first.get(name) or self.loaded.get(name, default)

    def close(self) -> None:
        """End all engines."""
        for engine in [*self.first.values(), *self.loaded.values()]:
            engine.close()
