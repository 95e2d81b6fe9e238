//! What the fuzz targets in `gateway/fuzz` found so far, again.

use std::path::Path;

use gateway::fuzz::DOORS;

#[test]
fn nothing_in_the_corpus_of_the_fuzz_targets_breaks_anything() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, door) in DOORS {
        let files = std::fs::read_dir(corpus.join(name)).unwrap();
        let mut count = 0;
        for file in files {
            door(&std::fs::read(file.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= 10, "{name} has {count} files");
    }
}
