"""The data sets that --data knows by name. Each file in this folder defines one as DATA_SET."""
import importlib
import pkgutil

from data.dataset import DataSet

DATA_SETS: dict[str, DataSet] = {}


def register(data_set: DataSet) -> None:
    """Let --data find a data set by its name; ValueError if the name is taken."""
    if data_set.name in DATA_SETS:
        raise ValueError(f"there is a data set named {data_set.name!r} already: take another name")
    DATA_SETS[data_set.name] = data_set


for _module in pkgutil.iter_modules(__path__):
    register(importlib.import_module(f"{__name__}.{_module.name}").DATA_SET)
