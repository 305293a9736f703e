"""HotpotQA answer scores, written out slowly from the description of hotpot_evaluate_v1.py.

An answer is lower-cased, every ASCII punctuation character is deleted, then the words a, an and the, then runs of
white space become one space. Exact match compares the results. F1 is over the multiset of words; where either side
is exactly yes, no or noanswer, F1 is 0 unless both are the same.
"""

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def words(text: str) -> list[str]:
    kept = ""
    for character in text.lower():
        if character not in PUNCTUATION:
            kept += character
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def exact_match(prediction: str, reference: str) -> float:
    return 1.0 if words(prediction) == words(reference) else 0.0


def token_f1(prediction: str, reference: str) -> float:
    ours, theirs = words(prediction), words(reference)
    for side in (ours, theirs):
        if " ".join(side) in ("yes", "no", "noanswer") and ours != theirs:
            return 0.0
    left, same = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    return 2 * (same / len(ours)) * (same / len(theirs)) / (same / len(ours) + same / len(theirs))
