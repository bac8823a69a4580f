"""The zoo: toy-sized models, true in architecture to what libraries build. A family is a file, and a line here."""

from tests.engine.zoo import attention, convolutional, recurrent, refused, varied
from tests.engine.zoo.entry import Entry

FAMILIES: dict[str, list[Entry]] = {
    "convolutional": convolutional.ENTRIES,
    "attention": attention.ENTRIES,
    "recurrent": recurrent.ENTRIES,
    "varied": varied.ENTRIES,
    "refused": refused.ENTRIES,
}
