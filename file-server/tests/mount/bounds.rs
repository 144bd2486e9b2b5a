//! What is bounded stays within its bounds.

use std::fs::{self, File};
use std::time::Duration;

use coracle_file_server::control::Client;

use crate::Case;
use crate::host::Mounted;

pub(crate) const CASES: &[Case] = &[
    ("a walk over a hundred thousand files needs no more than 256 descriptors", long_walk),
    ("fifty grants at once", fifty_grants),
    ("what the client forgets is forgotten", forgotten),
    ("files that are open for the client are bounded by an error", too_many_open),
];

/// What a file that the client references may take of the server's memory.
const BYTES_PER_NODE: u64 = 700;
const FILES: usize = 100_000;
const DIRECTORIES: usize = 1000;

fn long_walk(m: &Mounted) {
    let small = Mounted::with_descriptors(m.who, 256);
    for directory in 0..DIRECTORIES {
        let path = small.outside.join(format!("{}/{directory}", directory % 10));
        fs::create_dir_all(&path).unwrap();
        for number in 0..FILES / DIRECTORIES {
            File::create(path.join(number.to_string())).unwrap();
        }
    }
    // Names only, then all of their attributes, then files here and there by their whole path.
    let count = crate::host::run(&small.inside, &["sh", "-c", "find . -type f -size -1 | wc -l"]);
    assert_eq!(count.trim(), FILES.to_string());
    let count = crate::host::run(&small.inside, &["sh", "-c", "find . -type f -mmin -1000 | wc -l"]);
    assert_eq!(count.trim(), FILES.to_string());
    for directory in (0..DIRECTORIES).rev() {
        let path = small.inside.join(format!("{}/{directory}/7", directory % 10));
        assert_eq!(fs::read(path).unwrap(), b"");
    }
    assert!(small.server_descriptors() < 200, "{}", small.server_descriptors());
    let (nodes, memory) = (small.client.status().unwrap().nodes, small.server_memory());
    println!("     {nodes} nodes are referenced, {} KiB are resident", memory >> 10);
    assert!(memory < nodes * BYTES_PER_NODE + (32 << 20));
    small.end();
}

fn fifty_grants(m: &Mounted) {
    for number in 0..50 {
        let path = m.folder.path().join(format!("tree-{number}"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("f"), number.to_string()).unwrap();
        m.grant(&format!("grant-{number}"), &path, true);
    }
    for number in 0..50 {
        let path = m.root.join(format!("grant-{number}/f"));
        assert_eq!(fs::read_to_string(path).unwrap(), number.to_string());
    }
    assert_eq!(fs::read_dir(&m.root).unwrap().count(), 0, "whose name is not known is not found");
}

fn forgotten(m: &Mounted) {
    for number in 0..2000 {
        File::create(m.outside.join(number.to_string())).unwrap();
    }
    let list = || assert_eq!(crate::host::run(&m.inside, &["sh", "-c", "ls -l | wc -l"]).trim(), "2001");
    list();
    assert!(m.client.status().unwrap().nodes > 2000);
    // Removing files makes the kernel forget them; what it says of that comes with later requests.
    fs::remove_dir_all(&m.inside).unwrap_err();
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while m.client.status().unwrap().nodes > 10 {
        assert!(std::time::Instant::now() < deadline, "{:?}", m.client.status().unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn too_many_open(m: &Mounted) {
    let mut small = Mounted::with_descriptors(m.who, 64);
    let path = small.inside.join("f");
    fs::write(&path, "x").unwrap();
    let mut open = Vec::new();
    let error = loop {
        match File::open(&path) {
            Ok(file) => open.push(file),
            Err(error) => break error,
        }
        assert!(open.len() < 64);
    };
    assert!(matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)), "{error}");
    assert!(open.len() > 30);
    // The daemon is heard all the same, also one that came back, and may grant more.
    small.client = Client::connect(&small.folder.path().join("control"), || ()).unwrap();
    small.grant("more", &small.outside, true);
    assert_eq!(small.client.status().unwrap().open, open.len() as u64);
    drop(open);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while fs::read(&path).is_err() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    small.end();
}
