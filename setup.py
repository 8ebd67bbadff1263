"""What belongs to the package `adavtp`: the front door, and the rooms that lie beside it as its sub-packages."""

from setuptools import find_packages, setup

ROOMS = ("configuration", "modeling", "tasks", "trainer", "evaluation", "hub_cards")

in_rooms = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
setup(
    packages=["adavtp", "adavtp.commands", *(f"adavtp.{name}" for name in in_rooms)],
    package_dir={"adavtp": "adavtp", **{f"adavtp.{room}": room for room in ROOMS}},
)
