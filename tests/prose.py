"""What the perplexity of a real model is measured on."""

TEXT = (
    "A key/value cache keeps what a language model has computed of the tokens "
    "that it has read, so that the next token costs no more than itself. "
    "Without one, each new word would have the model read all of the text, "
    "and the longer the text, the longer the wait. What is kept grows with the "
    "text, though. A small model of a long memory may hold more bytes of keys "
    "and values than of weights. There are three remedies. Layers that look "
    "back no further than a window need no more than that window, and a place "
    "whose token has left it may be given to a new one. Numbers may be stored "
    "in fewer bits, with a scale beside them, since what attention makes of "
    "them is an average. And of a text without an end, the first few tokens "
    "and the last thousand are often enough to go on, although nobody should "
    "ask such a model what was said in between."
)
