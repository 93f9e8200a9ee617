"Scenes of every kind, for hypothesis."
from hypothesis import strategies as st

from ddpo_nb.scenes import COUNTS, GROUNDS, NOUNS, RELATIONS, Scene

grounds, nouns = st.sampled_from([None, *GROUNDS]), st.sampled_from(NOUNS)
pairs = st.lists(nouns, min_size=2, max_size=2, unique=True).map(tuple)
scenes = st.one_of(
    st.builds(Scene, st.tuples(nouns), st.sampled_from(COUNTS), st.none(), grounds),
    st.builds(Scene, pairs, st.just(1), st.sampled_from([None, *RELATIONS]), grounds))
