//! `/hot` of nodes: the objects that do most, by what they do.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Objects that are shown of each measure.
pub const SHOWN: usize = 20;

/// The hottest objects by measure, such as `requests_per_second`; the first is the hottest. Rates are averages
/// that forget with a time constant of 60 seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HotPage(pub BTreeMap<String, Vec<HotObject>>);

/// One object by one measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HotObject {
    pub class: String,
    pub id: String,
    pub name: Option<String>,
    pub value: f64,
    /// By so much `value` may be too high.
    pub too_high_by: f64,
}

impl HotPage {
    /// Adds what another worker shows.
    pub fn add(&mut self, other: Self) {
        for (measure, objects) in other.0 {
            let mine = self.0.entry(measure).or_default();
            mine.extend(objects);
            mine.sort_by(|left, right| {
                let by_value = right.value.total_cmp(&left.value);
                by_value.then_with(|| left.id.cmp(&right.id))
            });
            mine.truncate(SHOWN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_workers_become_one_with_the_hottest_first() {
        let page = |values: &[u32]| {
            let object = |value: &u32| HotObject {
                class: "Room".to_owned(),
                id: format!("{value:03}"),
                name: None,
                value: f64::from(*value),
                too_high_by: 0.0,
            };
            let objects = values.iter().map(object).collect();
            HotPage(BTreeMap::from([("bytes".to_owned(), objects)]))
        };
        let mut all = HotPage::default();
        all.add(page(&[30, 10]));
        all.add(page(&(0..50).rev().collect::<Vec<u32>>()));
        let values: Vec<f64> = all.0["bytes"].iter().map(|object| object.value).collect();
        assert_eq!(values.len(), SHOWN);
        assert_eq!(values[..3], [49.0, 48.0, 47.0]);
        assert!(values.is_sorted_by(|left, right| left >= right));
    }
}
