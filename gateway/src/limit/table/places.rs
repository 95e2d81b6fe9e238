//! The memory of a table: sets of places, read by anybody and written under the lock of their shard.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::allocation::try_zeroed_slice_box;
use bytemuck::{Pod, Zeroable};

use super::Spot;

/// Places of a set: with their tags and the state of a bucket, a cache line.
pub(super) const WAYS: usize = 5;
const _: () = assert!(Places::<[u64; 1]>::LINES == 1);

/// The tag of a place that nobody has.
pub(super) const NOBODY: u32 = 0;

/// Words of a cache line.
const LINE: usize = 8;

/// Words of a set that are tags, two in each.
const TAG_WORDS: usize = WAYS.div_ceil(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) set: usize,
    pub(super) way: usize,
}

/// All sets. What one holds is written under the lock of its shard.
pub(super) struct Places<S> {
    /// [`Places::LINES`] per set: tags, then states. Zeros, which take memory only where they are written.
    lines: Box<[Line]>,
    /// One per set: nobody gets more than this leaves. Zeros too.
    floors: Box<[AtomicU64]>,
    state: PhantomData<fn() -> S>,
}

#[derive(Zeroable)]
#[repr(C, align(64))]
struct Line([AtomicU64; LINE]);

impl<S> Places<S> {
    /// Words of a state.
    const WORDS: usize = size_of::<S>() / size_of::<u64>();
    /// Lines of a set.
    pub(super) const LINES: usize = (TAG_WORDS + WAYS * Self::WORDS).div_ceil(LINE);
}

impl<S: Pod> Places<S> {
    /// `None` if there is no address space for so many. Not in huge pages, though a decision would take a tenth less
    /// time: a few keys would take them all.
    pub(super) fn new(sets: usize) -> Option<Self> {
        const { assert!(size_of::<S>().is_multiple_of(size_of::<u64>())) };
        Some(Self {
            lines: try_zeroed_slice_box(sets * Self::LINES).ok()?,
            floors: try_zeroed_slice_box(sets * Self::WORDS).ok()?,
            state: PhantomData,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.lines) + size_of_val(&*self.floors)
    }

    /// What is known of a key.
    pub(super) fn find(&self, spot: &Spot) -> Option<Place> {
        // Both are looked at, whatever the first says: so their cache misses are side by side.
        let found = spot.sets.map(|set| self.ways(set, spot.tag));
        let both = found[0] | found[1] << WAYS;
        let way = both.trailing_zeros() as usize;
        (both != 0).then(|| Place {
            set: spot.sets[way / WAYS],
            way: way % WAYS,
        })
    }

    /// The same, of which `seen` was true a moment ago.
    pub(super) fn find_again(&self, spot: &Spot, seen: Option<Place>) -> Option<Place> {
        let still = |place: &Place| self.tags(place.set)[place.way] == spot.tag;
        seen.filter(still).or_else(|| self.find(spot))
    }

    /// Those of a set with this tag, a bit each.
    fn ways(&self, set: usize, tag: u32) -> u32 {
        let tags = self.tags(set).into_iter().enumerate();
        tags.fold(0, |found, (way, other)| {
            found | u32::from(other == tag) << way
        })
    }

    pub(super) fn tags(&self, set: usize) -> [u32; WAYS] {
        let words: [u64; TAG_WORDS] =
            std::array::from_fn(|word| self.word(set, word).load(Ordering::Relaxed));
        std::array::from_fn(|way| half(words[way / 2], way % 2))
    }

    pub(super) fn set_tag(&self, place: Place, tag: u32) {
        let word = self.word(place.set, place.way / 2);
        let mut halves: [u32; 2] = std::array::from_fn(|n| half(word.load(Ordering::Relaxed), n));
        halves[place.way % 2] = tag;
        let whole = u64::from(halves[0]) | u64::from(halves[1]) << 32;
        word.store(whole, Ordering::Relaxed);
    }

    pub(super) fn state(&self, place: Place) -> S {
        let first = TAG_WORDS + place.way * Self::WORDS;
        load(|word| self.word(place.set, first + word))
    }

    pub(super) fn set_state(&self, place: Place, state: &S) {
        let first = TAG_WORDS + place.way * Self::WORDS;
        store(state, |word| self.word(place.set, first + word));
    }

    pub(super) fn floor(&self, set: usize) -> S {
        load(|word| &self.floors[set * Self::WORDS + word])
    }

    pub(super) fn set_floor(&self, set: usize, floor: &S) {
        store(floor, |word| &self.floors[set * Self::WORDS + word]);
    }

    fn word(&self, set: usize, word: usize) -> &AtomicU64 {
        &self.lines[set * Self::LINES + word / LINE].0[word % LINE]
    }
}

fn half(word: u64, number: usize) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "it is a half")]
    let half = (word >> (32 * number)) as u32;
    half
}

fn load<'w, S: Pod>(word: impl Fn(usize) -> &'w AtomicU64) -> S {
    let mut state = S::zeroed();
    let words = bytemuck::cast_slice_mut::<S, u64>(std::slice::from_mut(&mut state));
    for (number, into) in words.iter_mut().enumerate() {
        *into = word(number).load(Ordering::Relaxed);
    }
    state
}

fn store<'w, S: Pod>(state: &S, word: impl Fn(usize) -> &'w AtomicU64) {
    let words = bytemuck::cast_slice::<S, u64>(std::slice::from_ref(state));
    for (number, from) in words.iter().enumerate() {
        word(number).store(*from, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_was_given_away_meanwhile_is_not_taken_for_the_key() {
        let places: Places<[u64; 1]> = Places::new(2).unwrap();
        let spot = |tag| Spot {
            shard: 0,
            sets: [0, 1],
            tag,
        };
        let (first, second) = (Place { set: 0, way: 2 }, Place { set: 1, way: 4 });
        places.set_tag(first, 7);
        let seen = places.find(&spot(7));
        assert_eq!(seen, Some(first));
        assert_eq!(places.find_again(&spot(7), seen), Some(first));
        // Somebody else has it now; the key has none, and then another one.
        places.set_tag(first, 8);
        assert_eq!(places.find_again(&spot(7), seen), None);
        places.set_tag(second, 7);
        assert_eq!(places.find_again(&spot(7), seen), Some(second));
        // It came while nobody held the lock.
        assert_eq!(places.find_again(&spot(8), None), Some(first));
    }

    #[test]
    fn tags_and_states_of_a_set_are_apart() {
        let places: Places<[u64; 3]> = Places::new(2).unwrap();
        for way in 0..WAYS {
            let place = Place { set: 1, way };
            let number = u32::try_from(way).unwrap();
            places.set_tag(place, u32::MAX - number);
            places.set_state(place, &[u64::from(number); 3]);
        }
        places.set_floor(1, &[9; 3]);
        for way in 0..WAYS {
            let number = u32::try_from(way).unwrap();
            assert_eq!(places.tags(1)[way], u32::MAX - number);
            assert_eq!(places.state(Place { set: 1, way }), [u64::from(number); 3]);
        }
        assert_eq!(places.tags(0), [NOBODY; WAYS]);
        assert_eq!((places.floor(0), places.floor(1)), ([0; 3], [9; 3]));
    }
}
