"""Pages: a visual question answering task made of dense text.

A page is 24 lines of 24 places, and every glyph on it fills one patch of a vision tower, in one of 19 typefaces. It
has one of three forms: a ledger of keys and values, notes with marked words, or a table; and it is full of other text
that no question asks about. A key is two capitals and a value two digits, none twice on a page.

=================  ==============================================  =========================
kind               question                                        answer
=================  ==============================================  =========================
``value_of_key``   what is the value of KX ?                       two digits
``key_of_value``   which key has the value 42 ?                    two capitals
``cell``           what is in row KX and column QD ?               two digits
``larger``         which is larger , KX or MB ?                    two capitals
``below``          which key is below KX ?                         two capitals
``count``          how many entries are there ? (in tables: rows)  a number
``read_line``      read the line of KX .                           8 to 20 glyphs
``read_entries``   read all the entries .                          keys and values, in order
=================  ==============================================  =========================

Why this task suits visual token pruning: the answer to a short question is in about four of 576 patches, any other
patch can go, and nothing but the question says which. A picture made smaller cannot be read at all.

The splits have no typeface, no pair of margins and no pair of key and value in common. Everything is decided by
``(split, seed, index)``: a page can be drawn again alone, and the first hundred pages of a larger set are the smaller
set.

>>> import numpy as np
>>> page = draw_page("train", index=0)
>>> [question.kind for question in ask_questions(page, np.random.default_rng(0), ["count", "below"])]
['count', 'below']
"""

from .dataset import load_page_questions, load_pages
from .drawing import draw_page
from .page import FORMS, GLYPHS, PATCH_LABELS, PATCH_ROLES, PATCH_WORDS, Entry, Page, patch_labels, split_of_pair
from .questions import LONG_KINDS, QUESTION_KINDS, SHORT_KINDS, Question, ask_questions, kinds_of_page

__all__ = [
    "FORMS",
    "GLYPHS",
    "LONG_KINDS",
    "PATCH_LABELS",
    "PATCH_ROLES",
    "PATCH_WORDS",
    "QUESTION_KINDS",
    "SHORT_KINDS",
    "Entry",
    "Page",
    "Question",
    "ask_questions",
    "draw_page",
    "kinds_of_page",
    "load_page_questions",
    "load_pages",
    "patch_labels",
    "split_of_pair",
]
