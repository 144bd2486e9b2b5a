//! Loads archives into a store and shows what is in it: `load STORE [ARCHIVE]…`. For trying archives by hand.

use std::error::Error;
use std::fs::File;
use std::path::Path;

use coracle_image_store::ImageStore;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let store = ImageStore::open(Path::new(&arguments.next().ok_or("usage: load STORE [ARCHIVE]…")?))?;
    for archive in arguments {
        for loaded in store.load(File::open(archive)?, &mut |_| {})? {
            loaded.messages().iter().for_each(|message| println!("{message} ({})", loaded.platform));
        }
    }
    for line in store.list()? {
        println!("{} {:?} {:?} {} bytes", line.id.short(), line.repo_tags, line.repo_digests, line.size);
        for layer in store.image(&line.id)?.layers {
            println!("  {} {}", layer.diff_id.short(), layer.path.display());
        }
    }
    Ok(())
}
