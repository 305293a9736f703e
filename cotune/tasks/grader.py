"""placeholder"""


class GraderFailed(Exception):
    pass


def compare(reference: str, prediction: str) -> bool:
    return reference == prediction
