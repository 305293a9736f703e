"""The pools of names and things that the micro tasks draw from, and the draw of a kind from a mixture."""

from __future__ import annotations

import random
from collections.abc import Mapping

# name, subject pronoun, object pronoun
PEOPLE = tuple((n, "She", "her") for n in (
    "Ana", "Mia", "Eva", "Lily", "Nora", "Zoe", "Ella", "Ruth", "Iris", "Lena", "Tara", "Maya", "Rose", "Anna", "June",
)) + tuple((n, "He", "him") for n in (
    "Tom", "Ben", "Sam", "Max", "Leo", "Dan", "Jack", "Paul", "Omar", "Ivan", "Luis", "Hugo", "Adam", "Noah", "Carl",
))  # fmt: skip

ITEMS = (
    "apples", "books", "coins", "cards", "pens", "stamps", "eggs", "shells", "toys", "cups", "balls", "nuts", "pears",
    "beads", "stones", "keys", "plums", "hats", "rings", "boxes",
)  # fmt: skip

TOWNS = (
    "Dorville", "Milton", "Ashby", "Corton", "Elmstead", "Farley", "Grimsby", "Holton", "Kelso", "Larkfield", "Norwick",
    "Oakham", "Penton", "Redhill", "Sutton", "Thornby", "Upton", "Walden", "Yarm", "Belford", "Castleton", "Denby",
)  # fmt: skip

JOBS = (
    "painter", "baker", "doctor", "teacher", "farmer", "sailor", "clerk", "lawyer", "nurse", "pilot", "tailor",
    "writer", "dancer", "banker", "miner", "judge",
)  # fmt: skip

INSTRUMENTS = ("piano", "violin", "flute", "drum", "harp", "guitar", "trumpet", "cello", "organ", "horn")

TITLES = (
    "Moon", "River", "Garden", "House", "Bird", "Winter", "Mirror", "Train", "Island", "Bridge", "Star", "Horse",
    "Crown", "Forest", "Letter", "Window", "Storm", "Gold", "Summer", "Silver", "Night", "Rain", "Fire", "Snow",
)  # fmt: skip

PLACES = (
    "drawer", "basket", "kitchen", "garden", "car", "attic", "desk", "closet", "cupboard", "garage", "suitcase", "tent",
    "hallway", "pocket", "cellar", "boat",
)  # fmt: skip
THINGS = ("key", "ring", "map", "ball", "lamp", "watch", "phone", "letter", "camera", "knife", "ticket", "purse")


def choose_kind(rng: random.Random, mix: Mapping[str, float]) -> str:
    return rng.choices(list(mix), list(mix.values()))[0]
