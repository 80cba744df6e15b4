"""Uses of the parts that need no PyTorch. What is printed is the same on every system.

Arguments: a folder to write in, and whether files in use are locked there, as on Windows.
"""

import gc
import importlib
import pkgutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import anymamba
from anymamba.assets import bundled_model
from anymamba.checkpoint import write_atomically
from anymamba.errors import CheckpointError, StateError
from anymamba.runtime.chat.template import render
from anymamba.runtime.convert import convert, quantize_checkpoint
from anymamba.runtime.serving.state_folder import StateFolder

PACKAGES = ("checkpoint", "runtime", "cli", "server", "assets")


def main(folder: Path, locks: bool) -> None:
    import_all()
    engine = anymamba.load()
    print(written(engine))
    use_states(engine, folder)
    use_weights(folder, locks)
    messages = [{"role": "user", "content": "Où ? \N{SNAKE}"}]
    print(ascii(render("{% for m in messages %}{{ m.content }}{% endfor %}", messages, True, {})))
    texts = folder / "texts"
    texts.mkdir()
    write_atomically(texts / "a.txt", lambda path: path.write_text("déjà", encoding="utf-8"))
    print(ascii((texts / "a.txt").read_text(encoding="utf-8")), [p.name for p in texts.iterdir()])


def import_all() -> None:
    for package in PACKAGES:
        module = importlib.import_module(f"anymamba.{package}")
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            importlib.import_module(found.name)
    assert "torch" not in sys.modules


def written(engine: anymamba.Engine) -> str:
    return engine.generate("ROMEO:", max_new_tokens=20, temperature=0.0).text


def use_states(engine: anymamba.Engine, folder: Path) -> None:
    file = folder / "romeo.state"
    engine.prefill(engine.state(), "ROMEO:").save(file)
    state = engine.load_state(file)
    engine.prefill(state, " But soft").save(file)  # over the file that the state came from
    print(engine.load_state(file).token_count)
    (folder / "broken.state").write_bytes(file.read_bytes()[:-8])
    try:
        engine.load_state(folder / "broken.state")
    except StateError as error:
        (folder / "broken.state").unlink()  # while the error is held, and with it what it was about
        print(type(error).__name__, "truncated" in str(error))
    states = StateFolder(folder / "states", 1 << 30)
    key = (6, "0" * 64)
    states.write(key, engine.prefill(engine.state(), "ROMEO:"))
    states.close()
    print(states.read(key, engine.identity))
    broken = next((folder / "states").iterdir())
    broken.write_bytes(broken.read_bytes()[:-8])
    try:
        states.read(key, engine.identity)
    except StateError:
        print(list((folder / "states").iterdir()))


def use_weights(folder: Path, locks: bool) -> None:
    source = bundled_model()
    quantized = quantize_checkpoint(source, folder / "int8", "int8")
    print(written(anymamba.load(quantized)))
    gguf = convert(source, folder / "model.gguf", "gguf")
    print(written(anymamba.load(gguf)))
    back = convert(gguf, folder / "back", "transformers")
    print(written(anymamba.load(back)))
    gc.collect()
    convert(source, back, "original", overwrite=True)
    engine = anymamba.load(back)
    refused = pytest.raises(CheckpointError, match="end the programs that have it open")
    with refused if locks else nullcontext():
        convert(source, back, "transformers", overwrite=True)
    print(written(engine))
    assert sorted(path.name for path in folder.glob(".*")) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "locks")
