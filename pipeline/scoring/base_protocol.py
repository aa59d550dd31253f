"""The protocol that the untuned base is credited with, chosen on validation questions and never on test questions."""

from pipeline.scoring.measures import Figures, Interval, score
from pipeline.scoring.predictions import Predictions
from pipeline.sections.evaluate import ProtocolName

CANDIDATES: tuple[ProtocolName, ...] = ("chat", "lm_eval")  # those that show the abstract; of equals, the first wins


class Choice(Figures):
    """What was chosen, and what it was chosen by."""

    chosen: ProtocolName
    questions: int  # validation questions
    accuracy: dict[ProtocolName, Interval]  # on them, with Wilson's interval


def choose(validation: Predictions, confidence: float) -> Choice:
    """The candidate with the highest accuracy on the validation questions: the base was trained for none of them."""
    asked: list[ProtocolName] = [name for name in CANDIDATES if name in validation]
    accuracy: dict[ProtocolName, Interval] = {name: score(validation[name], confidence).accuracy for name in asked}
    chosen = max(asked, key=lambda name: accuracy[name].value)
    return Choice(chosen=chosen, questions=len(validation[chosen]), accuracy=accuracy)
