"""How often the quantized file that ships answers as its 16-bit GGUF does: `python benchmarks/q4_agreement.py`.

Run it in the project's root after `dvc repro`; it needs models/merged, and records tiny.q4_agreement.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from record import HERE, record

from pipeline.evaluate import Params, predict
from pipeline.gguf import convert


def main() -> None:
    params, test = Params.load("evaluate"), Path("data/formatted/test.jsonl")
    with TemporaryDirectory(dir="models") as temporary:
        wide = Path(temporary, "16bit.gguf")
        convert(Path("models/merged"), wide, {})
        of_wide, _ = predict(wide, test, params)
    of_shipped, _ = predict(Path("models/medical-reasoner.gguf"), test, params)
    changed = [one[0] for one, other in zip(of_wide, of_shipped, strict=True) if one[5] != other[5]]
    log = HERE / "logs" / "q4_agreement.log"
    log.write_text(f"{len(changed)} of {len(of_wide)} answers differ, PMIDs {' '.join(changed)}\n", encoding="utf-8")
    agreement = 1 - len(changed) / len(of_wide)
    record({"tiny.q4_agreement": (round(agreement, 4), "")}, "python benchmarks/q4_agreement.py", log)


if __name__ == "__main__":
    main()
