"""
The page of the demo, each file one job:

- `photos`: which photo a visitor means, and reading it safely.
- `looks`: what a model finds in a photo, computed by `cbsa_hf` and kept for a while.
- `drawing`: arrays to small pictures, colours and scales.
- `maps`, `views`, `story`: a look as HTML.
- `text`: what the page says in words.
- `parameters`: what visitors choose, checked.
- `answers`: what each part of the page says to what was chosen.
- `choices`: what a visitor does, as values for the components.
- `page`: the components, and which depends on which.
- `endpoints`: the same looks as numbers, for programs and agents.
"""
