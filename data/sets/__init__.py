"""The data sets that --data knows by name. Each file in this folder defines one as DATA_SET,
or several as DATA_SETS."""
import importlib
import pkgutil

from data.dataset import DataSet

DATA_SETS: dict[str, DataSet] = {}


def register(data_set: DataSet) -> None:
    """Let --data find a data set by its name; ValueError if the name is taken."""
    if data_set.name in DATA_SETS:
        raise ValueError(f"there is a data set named {data_set.name!r} already: take another name")
    DATA_SETS[data_set.name] = data_set


for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    for _data_set in getattr(_module, "DATA_SETS", ()) or (_module.DATA_SET,):
        register(_data_set)
